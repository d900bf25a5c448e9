"""The classes of a run's rows: which there are, in which order, and what is wrong with them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rankfold.errors import nearest, short
from rankfold.tasks.rows import DataError, Rows

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor


def index_of(
    rows: Rows, counts: dict[str, Counter[str | int]], order: list[str | int] | None, noun: str = "label"
) -> dict[str, int]:
    """The index of each class. `rows` learns which classes there are, and what a reader should know of them.

    Args:
        counts: by split, how often a class occurs.
        order: `data.labels`; by default that of the head if it knows these classes, else they are sorted.
        noun: what they are called.

    Raises:
        DataError: fewer than two, or one that only other splits have.
    """
    seen = sorted(counts["train"], key=lambda label: (isinstance(label, str), _natural(label)))
    labels = [str(label) for label in (order if order is not None else as_known(seen, rows.known) or seen)]
    if len(labels) < 2:
        raise DataError(f"train has the single {noun} {short(seen[0])}; classification needs at least two")
    if repeated := [label for label, count in Counter(labels).items() if count > 1]:
        raise DataError(f"data.labels names {', '.join(map(repr, repeated))} more than once")
    for name, counter in counts.items():
        for label, count in counter.items():
            if str(label) not in labels:
                where = "is not in data.labels" if order is not None else "is never seen in train"
                what = rows.counted if count > 1 else rows.counted.removesuffix("s")
                raise DataError(
                    f"{name}: the {noun} {short(label)} ({count:,} {what}) {where}; known {noun}s: {', '.join(labels)}"
                )
    of_train = Counter(map(str, counts["train"].elements()))
    rows.class_counts = {label: of_train[label] for label in labels}
    if order is None:
        rows.notes += [f"train: {note}" for note in _alike(labels, noun)]
        if numbers := [label for label in labels if _is_fraction(label)]:
            rows.notes.append(
                f"train: {len(numbers):,} of {len(labels):,} {noun}s are numbers with a fraction (such as {numbers[0]}), and each is "
                "taken for a class; give data.labels if that is meant"
            )
    if unseen := set(labels) - {str(label) for label in seen}:
        rows.notes.append(f"train: no row has the {noun} {', '.join(sorted(unseen))} of data.labels")
    rows.labels = labels
    return {label: i for i, label in enumerate(labels)}


def as_known(labels: Sequence[str | int], known: Sequence[str]) -> list[str] | None:
    """The labels in the order in which a head knows them, whatever their case; None where it knows others."""
    ours, theirs = {_plain(str(label)): str(label) for label in labels}, [_plain(label) for label in known]
    if len(ours) != len(labels) or sorted(ours) != sorted(theirs):
        return None
    return [ours[label] for label in theirs]


def likeliest(logits: Any, labels: Tensor) -> Tensor:
    """The likeliest class of each row or word, all that an evaluation keeps: encoders and decoders give their hidden states too."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def only(split: Dataset, column: str, classes: Sequence[str | int], name: str) -> Dataset:
    """The rows of some classes.

    Args:
        column: that of the class.
        name: of the split.

    Raises:
        DataError: a class that no training row has, or no row left.
    """
    wanted, found = {str(c) for c in classes}, [str(value) for value in split[column]]
    known = sorted(set(found), key=_natural)
    if name == "train" and (absent := [str(c) for c in classes if str(c) not in known]):
        raise DataError(
            f"data.classes: no row of train has the class {absent[0]!r}{nearest(absent[0], known, 'it has')}"
        )
    kept = [i for i, value in enumerate(found) if value in wanted]
    if not kept:
        raise DataError(
            f"{name} has no row of data.classes ({', '.join(map(str, classes))}); it has: {', '.join(known)}"
        )
    return split.select(kept)


def _alike(labels: list[str], noun: str) -> list[str]:
    """Sentences about classes that differ in case or spaces alone."""
    found: dict[str, list[str]] = {}
    for label in labels:
        found.setdefault(_plain(label), []).append(label)
    twins = [
        f"the {noun}s {', '.join(map(repr, same))} differ in case or spaces alone; if they are one class, write them alike"
        for same in found.values()
        if same[1:]
    ]
    lone = [same[0] for same in found.values() if not same[1:] and same[0] != same[0].strip()]
    return twins + [f"the {noun} {label!r} begins or ends with a space" for label in lone]


def _plain(label: str) -> str:
    return " ".join(label.casefold().split())


def _is_fraction(label: str) -> bool:
    try:
        return not label.strip().lstrip("+-").isdecimal() and math.isfinite(float(label))
    except ValueError:
        return False


def _natural(label: str | int) -> tuple[int, int, str]:
    """10 after 9, also where a CSV file made them text."""
    return (0, int(label), "") if str(label).lstrip("-").isdecimal() else (1, 0, str(label))
