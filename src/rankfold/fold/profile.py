"""What a profile is: one way to write a folded adapter for some of its consumers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rankfold.factors import Factors
from rankfold.fold.source import Source


@dataclass(frozen=True)
class Folded:
    """What a profile writes.

    Args:
        source: where it comes from.
        factors: for every site of the source, balanced and rounded to `dtype`; rank 0 where it has no adapter.
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


@dataclass(frozen=True)
class Written:
    """What a profile wrote.

    Args:
        rank: the largest in the file, padding included.
        parameters: numbers in the adapter's matrices.
        read: the factors of a module as read back from the disk, scale included.
        serve: by engine, the command that loads it.
        notes: what its user should know.
    """

    rank: int
    parameters: int
    read: Callable[[str], Factors]
    serve: dict[str, str]
    notes: list[str] = field(default_factory=list)


#: Writes a folded adapter into a folder, which is not yet at its final place.
Profile = Callable[[Folded, Path], Written]
