"""The metrics of an evaluation, and the file of metrics that a run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rankfold.tasks.task import Task


def tidy(logged: dict[str, Any], prefix: str, task: Task) -> dict[str, float]:
    """The loss and the task's metrics of one evaluation under our names: `eval_mean_token_accuracy` is `token_accuracy`."""
    short = {key.removeprefix(f"{prefix}_").removeprefix("eval_"): value for key, value in logged.items()}
    names = {"loss": "loss"} | {name: task.logged_as(name) for name in task.metrics}
    return {name: float(short[key]) for name, key in names.items() if short.get(key) is not None}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut off by a crash is left out."""
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
