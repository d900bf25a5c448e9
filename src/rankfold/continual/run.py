"""`rankfold continual`: trains every task that is not trained yet, and measures each on all tasks seen so far.

A task is one run of `train` in `output/task-<number>`. It is done when its result.json is there, which also has its row of the
matrix; nothing else says what is done.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers import TrainerCallback

from rankfold.algebra.combination import Term, combined, in_words
from rankfold.continual import start
from rankfold.continual.classes_seen import ClassesSeen
from rankfold.continual.file import ContinualFile
from rankfold.continual.file import load as load_tasks
from rankfold.continual.picture import draw
from rankfold.continual.result import ContinualResult
from rankfold.continual.task_list import TaskRows, measured_rows, resolve
from rankfold.errors import RankfoldError
from rankfold.fold import fold_source, read_source
from rankfold.host import registry
from rankfold.io.files import to_json, write_whole
from rankfold.runfile.load import load, parse
from rankfold.runfile.schema import RunFile
from rankfold.train import folder
from rankfold.train.data import load_rows
from rankfold.train.folder import FolderError
from rankfold.train.model import check_merges
from rankfold.train.prepare import processes
from rankfold.train.run import train

COPY, RESULT = "continual.yaml", "continual.json"


def continual(file: ContinualFile, *, command: str = "", say: Callable[[str], None] = print) -> ContinualResult:
    """Trains and measures the tasks in their order. Tasks that are done are not repeated, and one that was killed goes on.

    Args:
        command: how it was started, for the files.
        say: takes each sentence for the reader.

    Raises:
        FolderError: the folder is another one's, or in use. DataError: tasks that do not fit. And what `train` raises.
    """
    if (count := processes().num_processes) > 1:
        raise RankfoldError(
            f"rankfold continual trains in one process, not in {count}; start it without accelerate launch"
        )
    out = Path(file.output)
    _check_folder(out, file)
    tasks = resolve(file)
    _check_head(out, tasks)
    split, rows = measured_rows(file, tasks)
    if file.rule == "fresh":
        check_merges(file.run_file(0, tasks[0].data), "next_task: fresh")
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FolderError(f"output: another `rankfold continual` is at work in '{out}'") from None
    try:
        write_whole(out / COPY, file.to_yaml(command or "rankfold.continual.run.continual"))
        done: list[RunFile] = []
        result: ContinualResult | None = None
        for number, task in enumerate(tasks):
            done.append(_run_file(file, number, task, done))
            row = _task(file, tasks, rows, done, command, say)
            result = result_of(
                file, tasks, split, [*(result.matrix if result else []), row], str(Path(done[-1].output, "adapter"))
            )
            _write(result, out)
            say(f"task {number + 1} of {len(tasks)} ({task.words()}): {result.metric} on {split} rows {result.measures.averages[-1]:.4f}, "
                "averaged over the tasks seen")  # fmt: skip
        assert result is not None
        if file.rule == "fresh":
            result = _together(result, done, out)
            _write(result, out)
        draw(result, out)
    finally:
        lock.release()
    return result


def _run_file(file: ContinualFile, number: int, task: TaskRows, before: list[RunFile]) -> RunFile:
    changed = start.changes(file.rule, before, file.training.seed + number)
    return parse(file.run_file(number, task.data, **changed).model_dump(exclude_none=True))


def _task(
    file: ContinualFile,
    tasks: list[TaskRows],
    rows: list[Any],
    runs: list[RunFile],
    command: str,
    say: Callable[[str], None],
) -> list[float]:
    """One row of the matrix: the metric on every task up to the last of `runs`, which is trained if it is not yet."""
    run, number = runs[-1], len(runs) - 1
    saved = Path(run.output, "result.json")
    others = [_name(j) for j in range(number)]
    if saved.is_file():
        folder.check(run, resume=True, overwrite=False)  # the same run, not another that has the name
        folder.check_rows(Path(run.output), load_rows(run).digests, run.data)
        folder.check_length(run)
        if not Path(run.output, "adapter").is_dir():
            raise FolderError(
                f"output: task {number + 1} is done, but its adapter is not in '{run.output}'; restore it, or remove that folder and "
                "those of later tasks to train them again"
            )
    else:
        if not Path(run.output, "run.yaml").is_file():
            shutil.rmtree(run.output, ignore_errors=True)  # it was killed before it began
        say(f"task {number + 1} of {len(tasks)}: {tasks[number].words()}")
        train(
            run,
            resume=True,
            further=dict(zip(others, rows, strict=False)),
            callbacks=_callbacks(file, tasks, number),
            command=command or "rankfold continual",
            say=say,
        )
    found = json.loads(saved.read_text(encoding="utf-8"))
    return [*(found["others"][name][run.metric] for name in others), found["after"][run.metric]]


def _name(number: int) -> str:
    return f"task-{number + 1}"


def _callbacks(file: ContinualFile, tasks: list[TaskRows], number: int) -> list[TrainerCallback]:
    found: list[TrainerCallback] = []
    if file.has_classes:
        seen = [i for task in tasks[: number + 1] for i in task.indices()]
        over = {"task": tasks[number].indices(), "seen": seen, "all": range(len(tasks[0].labels))}
        found.append(ClassesSeen(over[file.loss_over], seen, len(tasks[0].labels)))
    if file.rule == "own" and (end := registry.get(file.method.name).end_task) is not None:
        found.append(_EndTask(end))
    return found


class _EndTask(TrainerCallback):
    """Ends a task as its method does, before it is measured and saved."""

    def __init__(self, end: Callable[[Any, str], None]):
        self.end = end

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.end(model, "default")


def result_of(
    file: ContinualFile, tasks: list[TaskRows], split: str, matrix: list[list[float]], adapter: str
) -> ContinualResult:
    run = file.run_file(0, tasks[0].data)
    return ContinualResult(
        output=file.output,
        model=file.model.name,
        task=file.task,
        method={"name": file.method.name, **file.method.fields},
        next_task=file.rule,
        metric=run.metric,
        greater_is_better=run.greater_is_better,
        measured_on=split,
        tasks=[task.words() for task in tasks],
        matrix=matrix,
        adapter=adapter if file.rule != "fresh" or len(matrix) == 1 else None,
        notes=[],
    )


def _write(result: ContinualResult, out: Path) -> None:
    write_whole(out / RESULT, to_json(asdict(result) | asdict(result.measures)))


def _together(result: ContinualResult, runs: list[RunFile], out: Path) -> ContinualResult:
    """The sum of the tasks' adapters as one plain LoRA, with the last one's head; a note where they have none."""
    adapters = [Path(run.output, "adapter") for run in runs]
    try:
        terms = [Term(str(path), 1.0, read_source(path)) for path in adapters]
        earlier = [replace(term, source=replace(term.source, heads={})) for term in terms[:-1]]
        words = in_words([(1.0, str(path)) for path in adapters])
        fold_source(combined([*earlier, terms[-1]]), out / "adapter", origin=words, inputs=adapters, force=True)
    except RankfoldError as e:
        return replace(result, notes=[f"the tasks' adapters stay apart, in the order of model.adapters: {e}"])
    return replace(result, adapter=str(out / "adapter"))


# --- the folder -----------------------------------------------------------------------------------------------------------


def _check_folder(out: Path, file: ContinualFile) -> None:
    """Raises FolderError where the folder holds something else, or tasks under another loss; the rest their own files tell."""
    if out.exists() and not out.is_dir():
        raise FolderError(f"output: '{out}' is a file; name a folder")
    if (out / COPY).is_file():
        before = load_tasks(out / COPY).loss_over
        if file.has_classes and before != file.loss_over:
            raise FolderError(
                f"output: the tasks in '{out}' are of another row: loss_over was '{before}', is '{file.loss_over}'. Undo the change, "
                "or name another output"
            )
    elif out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()):
        raise FolderError(f"output: '{out}' is not empty and holds no tasks in a row; name another folder")


def _check_head(out: Path, tasks: list[TaskRows]) -> None:
    """Raises FolderError where a task that is there has a head for fewer classes."""
    saved = out / _name(0) / "run.yaml"
    if not (labels := tasks[0].labels) or not saved.is_file():
        return
    known = [str(label) for label in load(saved).data.labels or ()]
    if more := [label for label in labels if label not in known]:
        raise FolderError(
            f"output: the head of the tasks in '{out}' has the classes {', '.join(known)}, and it cannot grow by {', '.join(more)}; "
            "name every class that is to come in data.labels from the start, and another output"
        )
