"""The rows of a run, as they were found and as the trainer takes them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankfold.errors import RankfoldError

if TYPE_CHECKING:
    from datasets import Dataset


SPLITS = ("train", "validation", "test")


class DataError(RankfoldError):
    """The rows cannot be trained on; the message names file, row or column, and the fix."""


@dataclass
class Rows:
    """The rows of a run, by split, and facts about them.

    Args:
        kind: the columns that every split has.
        targets: those of them that hold what is to be learnt.
        carried: further columns that the task passes on where a split has them.
        known: the classes of the head that the run begins with, in order of their index; empty where it is new or has no names.
        labels: the classes in order of their index, where the task has classes.
        class_counts: what there is of each class in training.
        counted: what that is, in words.
        notes: sentences for the reader.
    """

    splits: dict[str, Dataset]
    kind: tuple[str, ...]
    targets: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    known: Sequence[str] = ()
    labels: list[str] = field(default_factory=list)
    class_counts: dict[str, int] = field(default_factory=dict)
    counted: str = "rows"
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, split: str) -> Dataset | None:
        return self.splits.get(split)

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(column for column in self.kind if column not in self.targets)

    def classes_in_words(self, most: int = 12) -> str:
        """The classes with what there is of each: "2: neg 10, pos 12"; empty where the task has none."""
        listed = [f"{label} {count:,}" for label, count in self.class_counts.items()]
        return f"{len(listed):,}: {', '.join(listed[:most])}{', ...' if listed[most:] else ''}" if listed else ""


@dataclass(frozen=True)
class Encoded:
    """One split as the trainer takes it.

    Args:
        rows: token ids (or pictures) and labels.
        lengths: tokens of every row before anything was cut off; 1 where rows are not tokens.
        second: where a row is a pair of sequences, those of its second one; else empty.
    """

    rows: Dataset
    lengths: list[int]
    second: list[int] = field(default_factory=list)

    @property
    def longest(self) -> list[int]:
        """Tokens of the longest sequence of every row."""
        return [max(pair) for pair in zip(self.lengths, self.second, strict=True)] if self.second else self.lengths

    def digest(self) -> str:
        """Of their content: other rows have another one."""
        found = hashlib.sha256()
        for part in self.rows.with_format("arrow").iter(1000):
            found.update(repr(part.to_pylist()).encode())  # pyright: ignore[reportAttributeAccessIssue]
        return found.hexdigest()

    def select(self, rows: Sequence[int]) -> Encoded:
        """Some rows of it, by their number."""
        return Encoded(
            self.rows.select(rows), *([part[i] for i in rows] for part in (self.lengths, self.second) if part)
        )


def mapped(table: Dataset, function: Callable[..., dict[str, Any]], **options: Any) -> Dataset:
    """`table.map`, whose result `datasets` keeps on the disk, until what makes it changes.

    `datasets` looks at the function itself. What it calls of this package or of transformers is known to it by name alone.

    Args:
        options: of `Dataset.map`.
    """
    return table.map(_called, fn_kwargs={"function": function, "made_by": made_by()}, **options)


@functools.cache
def made_by() -> str:
    """What rows are made by: this folder's files, and the packages that they call."""
    files = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))))
    return " ".join([files.hexdigest(), *(f"{name} {version(name)}" for name in ("transformers", "tokenizers"))])


def _called(*rows: Any, function: Callable[..., dict[str, Any]], made_by: str) -> dict[str, Any]:
    return function(*rows)
