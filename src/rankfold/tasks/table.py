"""The table of tasks: a row for each file of this folder that has a `TASK`. Cheap to import."""

from __future__ import annotations

import importlib
import math
import pkgutil
from pathlib import Path

from rankfold.errors import RankfoldError, nearest
from rankfold.tasks.task import Task

TASKS: dict[str, Task] = {}


def register(task: Task) -> Task:
    """Adds a row. A class of the same module and name, as from a notebook cell that is run twice, replaces the first.

    Raises:
        RankfoldError: another task of that name.
    """
    other = type(TASKS.get(task.name, task))
    if (other.__module__, other.__qualname__) != (type(task).__module__, type(task).__qualname__):
        raise RankfoldError(f"Task: name={task.name!r} is taken by {other.__qualname__}; choose another")
    TASKS[task.name] = task
    return task


def get(name: str) -> Task:
    """The row called `name`; raises RankfoldError that names the nearest."""
    if name not in TASKS:
        raise RankfoldError(f"task={name!r} is not known{nearest(name, TASKS, 'known')}")
    return TASKS[name]


def of_adapter(task_type: object, model_class: str = "") -> Task | None:
    """The task of an adapter's `task_type`, a string or PEFT's enum; where it has none, of the class that it was trained on."""
    if task_type is not None:
        return next((task for task in TASKS.values() if task.peft_type == getattr(task_type, "value", task_type)), None)
    return next((task for task in TASKS.values() if model_class.endswith(task.heads)), None)


def bounds_of(metric: str) -> tuple[float, float]:
    """The smallest and the largest value of a metric, which means the same in every task; none for one that no task has."""
    known = (task.metrics[metric].bounds for task in TASKS.values() if metric in task.metrics)
    return next(known, (-math.inf, math.inf))


def columns() -> dict[str, str]:
    """The columns of all tasks that a run file need not name → what they are called."""
    return {c: c for task in TASKS.values() for c in task.columns if c not in task.optional}


def optional_columns() -> set[str]:
    """The columns of all tasks that rows have only where a run file names them."""
    return {c for task in TASKS.values() for c in task.optional}


for _found in pkgutil.iter_modules([str(Path(__file__).parent)]):
    if _found.name != "table" and hasattr(_module := importlib.import_module(f"rankfold.tasks.{_found.name}"), "TASK"):
        register(_module.TASK)
