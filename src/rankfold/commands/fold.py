"""`rankfold fold`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rankfold.commands.command import CommonOptions, option, positional


@dataclass(kw_only=True)
class Options(CommonOptions):
    """fold an adapter into a plain LoRA that any engine serves"""

    adapter: str = positional("folder of the adapter")
    out: str = option("folder to write", short="-o")
    base: str | None = option("base model, if not the one that the adapter names", default=None)
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        "of the folded weights; by default the base model's", default=None
    )
    pad: Literal["serve", "none"] = option("serve: pad the rank to the next that engines name", default="serve")
    rank: int | None = option("compress to at most this rank, as well as any can", default=None, metavar="N")
    error: float | None = option(
        "compress to the least rank within this relative error, such as 0.01", default=None, metavar="E"
    )
    calibration: str | None = option(
        'texts (.jsonl with "text", or paragraphs): compress for their outputs', default=None, metavar="FILE"
    )
    strict: float | None = option(
        "fail, and write nothing, where a module's relative error exceeds this (--strict=E; 0.01 if none is given)",
        default=None,
        nargs="?",
        const=1e-2,
        metavar="E",
    )
    profile: Literal["uniform", "compact", "per_expert", "gguf", "mlx", "merged"] = option(
        "uniform: for every engine; compact: a rank for each module; per_expert: a LoRA for each expert; gguf: llama.cpp; mlx: mlx-lm; merged: a whole model",
        default="uniform",
    )
    no_probe: bool = option("do not compare outputs of the two on a probe batch", default=False)
    force: bool = option("replace the output folder if it exists", default=False)


def run(options: Options) -> int:
    from rankfold.fold import fold_adapter

    folded = fold_adapter(
        Path(options.adapter),
        Path(options.out),
        base=options.base,
        profile=options.profile,
        dtype=options.dtype,
        pad=options.pad,
        rank=options.rank,
        error=options.error,
        calibration=options.calibration,
        strict=options.strict,
        force=options.force,
        probe=not options.no_probe,
        progress=True,
    )
    print(folded.summary())
    return 0
