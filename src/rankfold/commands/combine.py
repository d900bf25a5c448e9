"""`rankfold combine`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rankfold.commands.command import CommonOptions, option, positional


@dataclass(kw_only=True)
class Options(CommonOptions):
    """add up adapters of any kind into one plain LoRA, exactly"""

    adapters: list[str] = positional("folders of adapters, ours or PEFT's", nargs="+", metavar="adapter")
    weights: list[float] = option("one per adapter, of any sign", nargs="+", type=float, metavar="W")
    out: str = option("folder to write", short="-o")
    base: str | None = option("base model of all of them, where they name different ones", default=None)
    rank: int | None = option("compress to at most this rank", default=None, metavar="N")
    error: float | None = option("compress to the least rank within this relative error", default=None, metavar="E")
    combination: Literal["sum", "ties", "dare_linear", "dare_ties"] = option(
        "sum: exact; the others keep some entries of each update and need --density, and --rank or --error",
        default="sum",
    )
    density: float | None = option("share of the entries that ties and dare keep", default=None, metavar="D")
    seed: int = option("of the entries that dare keeps", default=0)
    dtype: Literal["float32", "bfloat16", "float16"] | None = option("by default the base model's", default=None)
    pad: Literal["serve", "none"] = option("serve: pad the rank to the next that engines name", default="serve")
    strict: float | None = option(
        "fail, and write nothing, where a module's relative error exceeds this (--strict=E; 0.01 if none is given)",
        default=None,
        nargs="?",
        const=1e-2,
        metavar="E",
    )
    profile: Literal["uniform", "compact", "gguf", "mlx", "merged"] = option("as in fold", default="uniform")
    force: bool = option("replace the output folder if it exists", default=False)


def run(options: Options) -> int:
    from rankfold.algebra import combine

    report = combine(
        options.adapters,
        options.out,
        weights=options.weights,
        combination=options.combination,
        density=options.density,
        seed=options.seed,
        base=options.base,
        profile=options.profile,
        dtype=options.dtype,
        pad=options.pad,
        rank=options.rank,
        error=options.error,
        strict=options.strict,
        force=options.force,
        progress=True,
    )
    print(report.summary())
    return 0
