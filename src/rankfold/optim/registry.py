"""The table of optimisers: one row each, which the file of the optimiser registers. Those of third parties do the same."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import Field, dataclass, fields
from math import prod
from typing import Any

from torch import nn

from rankfold.errors import RankfoldError
from rankfold.host import registry as methods
from rankfold.optim.options import Options
from rankfold.optim.pair_aware import PairAware


@dataclass(frozen=True)
class OptimizerRow:
    """What is known of an optimiser without making one.

    Args:
        name: what run files, `rankfold optimizers` and `create` call it.
        title: what the paper calls it.
        paper: arXiv id, or "" where there is none.
        summary: one line.
        cls: the torch optimiser.
    """

    name: str
    title: str
    paper: str
    summary: str
    cls: type[PairAware]

    def check(self, **options: Any) -> Options:
        """The options, completed; raises RankfoldError for one that does not exist or is out of range."""
        return self.cls.Options.of(options)

    def options(self) -> tuple[Field[Any], ...]:
        """Name, default and `metadata["help"]` of every option."""
        return fields(self.cls.Options)

    def state_bytes(
        self, shapes: Iterable[tuple[int, int, int]], plain: int = 0, itemsize: int = 4, **options: Any
    ) -> int:
        """Bytes of its tensors after the first step (counts of steps left out).

        Args:
            shapes: (out, in, r) of every pair.
            plain: trained parameters that are not a pair's.
            itemsize: bytes of one element of the state.
        """
        given = self.check(**options)
        of_pairs = sum(prod(kept) for shape in shapes for kept in self.cls.remembers(*shape, given).values())
        return (of_pairs + 2 * plain) * itemsize

    def state_bytes_of(self, model: nn.Module, **options: Any) -> int:
        """The same for a model, whose factors may be on the meta device; raises what `pairs` raises."""
        parts = self.cls.split(model)
        plain = sum(p.parameter.numel() for p in parts.plain)
        return self.state_bytes([pair.shape for pair in parts.pairs], plain, **options)


#: All rows by name: ours, and those that third parties have registered so far.
OPTIMIZERS: dict[str, OptimizerRow] = {}


def register(row: OptimizerRow) -> OptimizerRow:
    """Adds a row; a second one of that name takes its place if it is of the same module (a notebook's cell that runs again).

    Raises:
        RankfoldError: another module's optimiser of that name.
    """
    before = OPTIMIZERS.get(row.name)
    if before is not None and before.cls.__module__ != row.cls.__module__:
        raise RankfoldError(f"OptimizerRow: name={row.name!r} is taken by {before.title}; choose another")
    OPTIMIZERS[row.name] = row
    return row


def rows() -> list[OptimizerRow]:
    """All rows by name, those of installed packages included."""
    methods.discover()  # the modules that entry points name may register optimisers too
    return sorted(OPTIMIZERS.values(), key=lambda row: row.name)


def known(name: str) -> bool:
    """Whether there is an optimiser of that name, those of installed packages included."""
    if name not in OPTIMIZERS:
        rows()
    return name in OPTIMIZERS


def get(name: str) -> OptimizerRow:
    """The row called `name`; raises RankfoldError that names the nearest."""
    if not known(name):
        near = difflib.get_close_matches(name, OPTIMIZERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "there are " + ", ".join(OPTIMIZERS)
        raise RankfoldError(f"optimizer={name!r} is not known; {hint}")
    return OPTIMIZERS[name]
