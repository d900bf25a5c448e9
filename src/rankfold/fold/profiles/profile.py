"""What a profile is: one format of a folded adapter, for some of its consumers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rankfold.fold.source import Source, Update
from rankfold.kernel.factors import Factors


@dataclass(frozen=True)
class Folded:
    """What a profile writes.

    Args:
        source: where it comes from.
        factors: for every site of the source, as `Profile.rounded` made them; rank 0 where it has no adapter.
        dtype: of the file.
        base: folder or hub id of the base model, if known.
        out: the folder's final name, for commands that are shown to the user.
        pad: "serve" or "none", see `uniform.serve_rank`.
    """

    source: Source
    factors: dict[str, Factors]
    dtype: torch.dtype
    base: str | None
    out: Path
    pad: str

    @property
    def rank(self) -> int:
        """The largest rank any module needs."""
        return max((f.rank for f in self.factors.values()), default=0)

    @property
    def heads(self) -> dict[str, Tensor]:
        """Trained heads as the file holds them, each with memory of its own: tied ones share theirs, which safetensors refuses."""
        heads = self.source.heads.items()
        return {key: head.detach().to("cpu", self.dtype, copy=True).contiguous() for key, head in heads}


@dataclass(frozen=True)
class Written:
    """What a profile wrote.

    Args:
        rank: the largest in the file, padding included.
        parameters: in the adapter's matrices (of the whole model, where that is what was written).
        read: the update of a module as read back from the disk: the factors, scale included, or the dense difference
            (out × in, float64) where the file holds none.
        serve: by engine, the command that loads it.
        notes: what its user should know.
    """

    rank: int
    parameters: int
    read: Callable[[str], Update]
    serve: dict[str, str]
    notes: list[str] = field(default_factory=list)


def to_dtype(exact: Factors, dtype: torch.dtype) -> Factors:
    return exact.to(dtype)


@dataclass(frozen=True)
class Profile:
    """One format.

    Args:
        write: writes a folded adapter into a folder, which is not yet at its final place.
        rounded: makes a module's factors of the exact ones (float64, balanced) and the file's dtype. Only here are they
            rounded, so that what a profile multiplies into them is rounded once.
        noun: what it makes, for people.
        library: that the card of the folder names.
        loads_as: what Python can load for the probe: an adapter for PEFT, a whole model for transformers, or nothing.
    """

    write: Callable[[Folded, Path], Written]
    rounded: Callable[[Factors, torch.dtype], Factors] = to_dtype
    noun: str = "a plain LoRA"
    library: str = "peft"
    loads_as: Literal["adapter", "model", "nothing"] = "nothing"
