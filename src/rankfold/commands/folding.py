"""Options of the commands that write a fold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from rankfold.commands.command import CommonOptions, option

if TYPE_CHECKING:
    from rankfold.fold import FoldOptions


@dataclass(kw_only=True)
class FoldingOptions(CommonOptions):
    """Of `fold`, `combine` and `extract`."""

    out: str = option("folder to write", short="-o")
    rank: int | None = option("compress to at most this rank, as well as any can", default=None, metavar="N")
    error: float | None = option(
        "compress to the least rank within this relative error, such as 0.01", default=None, metavar="E"
    )
    profile: Literal["uniform", "compact", "per_expert", "gguf", "mlx", "merged"] = option(
        "uniform: for PEFT and engines that read its folder; compact: a rank for each module; per_expert: a LoRA for each expert; gguf: llama.cpp; mlx: mlx-lm; merged: a whole model",
        default="uniform",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        "of the folded weights; by default the base model's", default=None
    )
    pad: Literal["serve", "none"] = option("serve: pad the rank to the next that engines name", default="serve")
    strict: float | None = option(
        "fail, and write nothing, where a module's relative error exceeds this (--strict=E; 0.01 if none is given)",
        default=None,
        nargs="?",
        const=1e-2,
        metavar="E",
    )
    force: bool = option("replace the output folder if it exists", default=False)

    @property
    def of_fold(self) -> FoldOptions:
        """The keywords of the functions behind these commands."""
        names = ("rank", "error", "profile", "dtype", "pad", "strict", "force")
        return cast("FoldOptions", {"progress": True, **{name: getattr(self, name) for name in names}})
