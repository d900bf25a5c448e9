"""`rankfold extract`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rankfold.commands.command import CommonOptions, option, positional


@dataclass(kw_only=True)
class Options(CommonOptions):
    """make a plain LoRA out of a full fine-tune"""

    base: str = positional("the model before: a folder, or a hub id in the local cache")
    tuned: str = positional("the model after")
    out: str = option("folder to write", short="-o")
    rank: int | None = option("at most this rank in every layer", default=None, metavar="N")
    error: float | None = option("the least rank within this relative error in every layer", default=None, metavar="E")
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
    from rankfold.algebra import extract

    report = extract(
        options.base,
        options.tuned,
        options.out,
        rank=options.rank,
        error=options.error,
        profile=options.profile,
        dtype=options.dtype,
        pad=options.pad,
        strict=options.strict,
        force=options.force,
        progress=True,
    )
    print(report.summary())
    return 0
