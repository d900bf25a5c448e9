"""The metrics of an evaluation, and the file of metrics that a run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rankfold.io.files import read_json_lines
from rankfold.tasks.task import Task


def tidy(logged: dict[str, Any], prefix: str, task: Task) -> dict[str, float]:
    """The loss and the task's metrics of one evaluation under our names: `eval_mean_token_accuracy` is `token_accuracy`."""
    short = {key.removeprefix(f"{prefix}_").removeprefix("eval_"): value for key, value in logged.items()}
    names = {"loss": "loss"} | {name: task.logged_as(name) for name in task.metrics}
    return {name: float(short[key]) for name, key in names.items() if short.get(key) is not None}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut off by a crash is left out."""
    return [row for _, row in read_json_lines(path, skip_damaged=True)]
