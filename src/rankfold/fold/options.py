"""How a fold is written: what everyone who writes one may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch

from rankfold.errors import RankfoldError
from rankfold.fold.profiles import compact, gguf, merged, mlx, per_expert, uniform
from rankfold.fold.profiles.profile import Profile

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROFILES: dict[str, Profile] = {
    "uniform": uniform.PROFILE,
    "compact": compact.PROFILE,
    "per_expert": per_expert.PROFILE,
    "gguf": gguf.PROFILE,
    "mlx": mlx.PROFILE,
    "merged": merged.PROFILE,
}
#: The largest relative error on disk that `strict` lets pass: rounding to bfloat16 is about 0.003.
STRICT = 1e-2


class FoldOptions(TypedDict, total=False):
    """Keywords of every function that writes a fold; see `CheckedOptions`."""

    profile: str
    dtype: str | None
    pad: str
    rank: int | None
    error: float | None
    strict: float | None
    force: bool
    progress: bool


@dataclass(frozen=True)
class CheckedOptions:
    """What was asked of a fold.

    Args:
        profile: one of `PROFILES`: the format, see `rankfold docs folding`.
        dtype: "float32", "bfloat16" or "float16"; by default the base's.
        pad: of profile uniform: "serve" pads the rank up to one that engines name in their flags, "none" does not.
        rank: compress every module to at most this rank; the best approximation, and its error is stated.
        error: compress every module to the smallest rank whose relative error (Frobenius) is within this.
        strict: fail where a module's relative error on disk exceeds this, all in all; `STRICT` is a good value.
        force: replace an earlier fold in the folder.
        progress: show a bar on a terminal, beyond a second.

    Raises:
        RankfoldError: a value that is not allowed.
    """

    profile: str = "uniform"
    dtype: str | None = None
    pad: str = "serve"
    rank: int | None = None
    error: float | None = None
    strict: float | None = None
    force: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise RankfoldError(f"profile={self.profile!r} must be one of {', '.join(PROFILES)}")
        if self.pad != "serve" and self.profile != "uniform":
            raise RankfoldError(f"pad={self.pad!r} is of profile uniform; profile={self.profile!r} pads nothing")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise RankfoldError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")
        if self.strict is not None and not self.strict > 0:
            raise RankfoldError(f"strict={self.strict} must be a positive relative error, for instance {STRICT}")
