"""The rows of a run, as they were found and as the trainer takes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rankfold.errors import RankfoldError

if TYPE_CHECKING:
    from datasets import Dataset


class DataError(RankfoldError):
    """The rows cannot be trained on; the message names file, row or column, and the fix."""


@dataclass
class Rows:
    """The rows of a run, by split, and facts about them.

    Args:
        kind: the columns that every split has.
        targets: those of them that hold what is to be learnt.
        labels: the classes in order of their index, where the task has classes.
        notes: sentences for the reader.
    """

    splits: dict[str, Dataset]
    kind: tuple[str, ...]
    targets: tuple[str, ...] = ()
    labels: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, split: str) -> Dataset | None:
        return self.splits.get(split)

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(column for column in self.kind if column not in self.targets)


@dataclass(frozen=True)
class Encoded:
    """One split as the trainer takes it.

    Args:
        rows: token ids (or pixels) and labels.
        lengths: tokens of every row before anything was cut off.
    """

    rows: Dataset
    lengths: list[int]
