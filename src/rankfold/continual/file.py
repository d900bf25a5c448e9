"""The file of `rankfold continual`: a run file whose rows come as tasks, one after another.

`model`, `task`, `method` and `training` are those of a run file; `data` is what all tasks share. The tasks are a list of rows,
`tasks`, or the classes of `data` in parts, `split`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from rankfold.host import registry
from rankfold.pages import cite
from rankfold.runfile.checks import check
from rankfold.runfile.imports import DESCRIPTION as IMPORTS
from rankfold.runfile.imports import load_all, with_places
from rankfold.runfile.load import check_command, command_of, overridden, read_values
from rankfold.runfile.problems import Problem, RunFileError, explain
from rankfold.runfile.schema import Data, Method, Model, RunFile, Section, TaskName, Training
from rankfold.runfile.yaml import KeyPath, write
from rankfold.tasks import table

Rule = Literal["own", "continue", "fresh"]


class Split(Section):
    parts: int = Field(
        gt=1, description="How many tasks; where the classes do not divide, the first ones get one more."
    )
    seed: int | None = Field(
        default=None, ge=0, description="Draws the order of the classes; null keeps that of data.labels, or sorts them."
    )


class ContinualFile(Section):
    """Tasks in a row. Build it with `load` (from a file) or `parse` (from a dictionary)."""

    model: Model = Field(description="The pretrained model, as in a run file.")
    task: TaskName = Field(description="What is learnt, as in a run file.")
    data: Data = Field(
        default=Data(), description="As in a run file: what all tasks share, or the rows that `split` divides."
    )
    tasks: list[Data] | None = Field(
        default=None,
        min_length=2,
        description="The rows of each task, as `data`, which has the keys that a task does not give.",
    )
    split: Split | None = Field(default=None, description="Instead of `tasks`: the classes of `data`, in parts.")
    method: Method = Field(description="The adapter, as in a run file.")
    next_task: Rule | None = Field(
        default=None,
        description="What a further task trains. own: what the method's own rule says; continue: the same adapter; fresh: a new "
        "adapter, with the earlier ones merged into the frozen weights. By default own where the method has a rule, else continue.",
    )
    loss_over: Literal["task", "seen", "all"] = Field(
        default="task", description="The classes in the training loss: those of the task, all seen so far, or all."
    )
    training: Training = Field(default=Training(), description="As in a run file, for each task.")
    imports: list[str] = Field(default=[], description=IMPORTS)
    output: str = Field(description="Folder of all tasks. One that is there is continued.")

    @property
    def rule(self) -> Rule:
        """What a further task trains."""
        return self.next_task or ("own" if has_rule(self.method.name) else "continue")

    @property
    def has_classes(self) -> bool:
        """Whether each task has classes of its own, and the model one head for all of them."""
        return table.get(self.task).new_head

    def data_of(self, number: int) -> Data:
        """The rows of one task of `tasks`, counted from 0."""
        assert self.tasks is not None
        return joined(self.data, self.tasks[number])

    def run_file(self, number: int, data: Data, **changed: Any) -> RunFile:
        """The run file of a task.

        Args:
            number: from 0. It is added to the seed, lest every task begin with the same new weights.
            data: its rows.
            changed: by section, what this task changes; `method` takes the place of the file's.
        """
        values = self.model_dump(include={"model", "task", "method", "training", "imports"}, exclude_none=True)
        first = self.training.seed
        shared = data if data.seed is not None else data.model_copy(update={"seed": first})
        values["training"] |= {"seed": first + number} | changed.get("training", {})
        values["model"] |= changed.get("model", {})
        return RunFile.model_validate(
            values
            | {"data": shared, "output": str(Path(self.output, f"task-{number + 1}"))}
            | ({"method": changed["method"]} if "method" in changed else {})
        )

    def to_yaml(self, comment: str = "") -> str:
        """Every value, defaults included, below a comment; of a task those that it gives, since the others are those of `data`."""
        values = self.model_dump(exclude_none=True)
        if self.tasks is not None:
            values["tasks"] = [rows.model_dump(exclude_unset=True) for rows in self.tasks]
        return write(values, comment)


def has_rule(method: str) -> bool:
    """Whether a method has a rule of its own for tasks in a row."""
    return not method.startswith("peft:") and method in registry.METHODS and registry.get(method).next_task is not None


def joined(shared: Data, own: Data) -> Data:
    """`shared` with the keys that `own` gives in their place."""
    return shared.model_copy(update={key: getattr(own, key) for key in own.model_fields_set})


def load(path: str | Path, overrides: Iterable[str] = ()) -> ContinualFile:
    """Read the file and apply `key=value` overrides.

    Raises:
        RunFileError: one line for each problem, with its line number. OSError: the file cannot be read.
    """
    values, lines = read_values(Path(path), f"no file '{path}'; {cite('continual')} shows one")
    if command_of(values) != "train":  # of a run file, what it lacks is said below
        check_command(values, "continual", path)
    return parse(values, overrides, where=str(path), lines=lines)


def parse(
    values: Any, overrides: Iterable[str] = (), where: str = "continual file", lines: dict[KeyPath, int] | None = None
) -> ContinualFile:
    """Check plain values as `load` does.

    Raises:
        RunFileError: one line for each problem.
    """
    lines = dict(lines or {})
    values = with_places(overridden(values, ContinualFile, overrides, where, lines), where)
    if isinstance(values.get("tasks"), list):
        values["tasks"] = [{"source": task} if isinstance(task, str) else task for task in values["tasks"]]
    if isinstance(values.get("training", {}), dict):
        # The best on the rows of one task is not the best on those of all.
        values["training"] = {"keep_best": False} | values.get("training", {})
    try:
        file = ContinualFile.model_validate(values)
    except ValidationError as e:
        raise RunFileError(explain(e, ContinualFile), where, lines) from None
    if problems := load_all(file.imports) or _check(file):
        raise RunFileError(problems, where, lines)
    return file


def _check(file: ContinualFile) -> list[Problem]:
    task, problems = table.get(file.task), []
    if (file.tasks is None) == (file.split is None):
        what = "one of the two" if file.tasks else "tasks (a list of rows) or split (classes in parts)"
        problems.append(Problem(("split",) if file.tasks else (), f"give {what}"))
    if task.new_head and "classes" in task.foreign:
        problems.append(
            Problem(
                ("task",), f"{task.name}: tasks in a row need classes of their own, and its tags are shared by all rows"
            )
        )
    elif file.split and not task.new_head:
        problems.append(
            Problem(("split",), f"{task.name} has no classes to split; list the rows of each task in tasks")
        )
    if file.rule == "own" and not has_rule(file.method.name):
        rows = ", ".join(row.name for row in registry.find() if row.next_task)
        message = f"'{file.method.name}' has no rule of its own ({rows} has one); use continue or fresh"
        problems.append(Problem(("next_task",), message))
    method = registry.METHODS.get(file.method.name)
    if file.rule == "continue" and method is not None and method.adapter.growing:
        message = (
            f"continue starts from an adapter of the shapes that '{method.name}' begins with, and it grows; use fresh"
        )
        problems.append(Problem(("next_task",), message))
    for i, rows in enumerate(file.tasks or ()):
        if rows.labels is not None:
            problems.append(
                Problem(("tasks", i, "labels"), "one head has the classes of all tasks; name them in data.labels")
            )
    if file.training.start_from is not None:
        message = "every task starts from the one before; remove it, or name earlier adapters in model.adapters"
        problems.append(Problem(("training", "start_from"), message))
    if file.has_classes and file.loss_over != "all" and file.training.extra.get("label_smoothing_factor"):
        message = f"label_smoothing_factor spreads over all classes, loss_over is '{file.loss_over}'; remove it or use loss_over: all"
        problems.append(Problem(("training", "extra"), message))
    return problems or _check_runs(file)


def _check_runs(file: ContinualFile) -> list[Problem]:
    """The problems of each task's run file, located in this file; repeated ones once."""
    found: dict[Problem, None] = {}
    for i in range(len(file.tasks or [0])):
        own = file.tasks[i].model_fields_set if file.tasks else set()
        run = file.run_file(i, file.data_of(i) if file.tasks else file.data)
        for p in check(run):
            its = p.path[0] == "data" and file.tasks and (len(p.path) == 1 or p.path[1] in own)
            found[Problem(("tasks", i, *p.path[1:]), p.message) if its else p] = None
    return list(found)
