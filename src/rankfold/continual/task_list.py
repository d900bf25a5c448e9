"""The tasks of a file: the rows of each, its classes, and everything that is wrong with them before any is trained."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankfold.continual.file import ContinualFile
from rankfold.runfile.schema import Data
from rankfold.tasks.rows import DataError
from rankfold.train.data import load_rows
from rankfold.train.prepare import prepare
from rankfold.train.run import measured_split


@dataclass(frozen=True)
class TaskRows:
    """One task.

    Args:
        data: the section of its run file.
        classes: its own, where tasks have classes.
        labels: of all tasks, in the order of the head.
    """

    data: Data
    classes: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    def words(self) -> str:
        """What tells it from the others."""
        if self.classes:
            return ", ".join(self.classes)
        return Path(self.data.source or self.data.train or "").name

    def indices(self) -> list[int]:
        """Of its classes in the head."""
        return [self.labels.index(c) for c in self.classes]


def resolve(file: ContinualFile) -> list[TaskRows]:
    """The tasks in their order.

    Raises:
        DataError: a class in two tasks, more parts than classes, rows that cannot be read, a task without rows.
    """
    if file.split is not None:
        tasks = _parts(file)
    elif file.has_classes:
        tasks = _classes(file)
    else:
        assert file.tasks is not None
        tasks = [TaskRows(file.data_of(i)) for i in range(len(file.tasks))]
    alone = next((i for i, t in enumerate(tasks) if len(t.classes) == 1), None)
    if alone is not None and (file.loss_over == "task" or (file.loss_over == "seen" and alone == 0)):
        over = "all" if alone == 0 else "seen"
        raise DataError(
            f"loss_over: task {alone + 1} has the single class {tasks[alone].classes[0]!r}, and a loss over it alone is always 0; "
            f"use loss_over: {over}, or tasks of two classes or more"
        )
    return tasks


def measured_rows(file: ContinualFile, tasks: list[TaskRows]) -> tuple[str, list[Any]]:
    """The split that is measured, test or else validation, and its rows of each task as the trainer takes them.

    Raises:
        DataError: a task has neither, or another split than the first one. And what `prepare` raises.
    """
    found = []
    for i, task in enumerate(tasks):
        with _named(i):
            found.append(measured_split(prepare(file.run_file(i, task.data))))
    split = found[0][0]
    for i, (name, _) in enumerate(found):
        if name is None or name != split:
            has = (
                f"only {name} rows, where task 1 has {split} rows"
                if name and split
                else "neither test nor validation rows"
            )
            raise DataError(f"task {i + 1} has {has}; name some in data.test, or hold out a share (test: 0.2)")
    assert split is not None
    return split, [rows for _, rows in found]


def _parts(file: ContinualFile) -> list[TaskRows]:
    assert file.split is not None
    labels = load_rows(file.run_file(0, file.data)).labels
    parts, order = file.split.parts, list(labels)
    if parts > len(labels):
        raise DataError(
            f"split.parts: {parts} is more than the {len(labels)} classes of data ({', '.join(labels)}); "
            f"give at most {len(labels)}"
        )
    if file.split.seed is not None:
        random.Random(file.split.seed).shuffle(order)
    size, more = divmod(len(order), parts)
    ends = [(i + 1) * size + min(i + 1, more) for i in range(parts)]
    chunks = [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return [_task(file.data, chunk, labels) for chunk in chunks]


def _classes(file: ContinualFile) -> list[TaskRows]:
    assert file.tasks is not None
    found: list[list[str]] = []
    for i in range(len(file.tasks)):
        with _named(i):
            counts = load_rows(file.run_file(i, file.data_of(i))).class_counts
        found.append([label for label, count in counts.items() if count])
        for j, earlier in enumerate(found[:-1]):
            if common := [c for c in found[-1] if c in earlier]:
                raise DataError(
                    f"tasks.{i}: the class {common[0]!r} is in task {j + 1} and task {i + 1}, and a class belongs to one task; "
                    "say in classes which rows each task keeps"
                )
    labels = [str(c) for c in file.data.labels or []] or [c for classes in found for c in classes]
    return [_task(file.data_of(i), classes, labels) for i, classes in enumerate(found)]


def _task(data: Data, classes: list[str], labels: list[str]) -> TaskRows:
    given = {"labels": list(labels), "classes": list(classes)}
    return TaskRows(data.model_copy(update=given), tuple(classes), tuple(labels))


@contextmanager
def _named(number: int) -> Iterator[None]:
    """Says of which task an error of its rows is."""
    try:
        yield
    except DataError as e:
        raise DataError(f"task {number + 1}: {e}") from e
