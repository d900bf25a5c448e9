"""Collects one score per row from the forward passes of the trainer's own evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.tasks.task import Task
from rankfold.train.trainers import CarefulTrainer


@dataclass
class RowScores:
    """Scores in the order of the rows; the metric is their mean by weight.

    Args:
        items: right or wrong, or the loss; where a row has many targets, the mean over them; of macro F1 what the row adds to it.
        weights: tokens of each row, or None where all rows count alike.
    """

    items: list[float] = field(default_factory=list)
    weights: list[float] | None = None

    @property
    def mean(self) -> float:
        """0 where no row counts, as the precision of a model that finds nothing."""
        weights = self.weights or [1.0] * len(self.items)
        return sum(w * x for w, x in zip(weights, self.items, strict=True)) / (sum(weights) or 1.0)


@contextmanager
def row_scores(trainer: CarefulTrainer, task: Task, metric: str) -> Iterator[RowScores]:
    """Collects what `trainer.evaluate` sees while the context is open; the scores are there when it has closed.

    Args:
        metric: one of the task's that is `of_rows`.
    """
    scores = RowScores()
    outputs: list[Any] = []
    first: list[float] = []
    second: list[float] = []

    def collect(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        outputs.append(output)
        if len(outputs) < task.passes:
            return
        inputs = kwargs if "labels" in kwargs or trainer.labels is None else {**kwargs, "labels": trainer.labels}
        items, weights = task.scores(outputs, inputs, metric, trainer)
        outputs.clear()
        both = trainer.accelerator.gather_for_metrics(torch.stack([items.double(), weights.double()], 1))
        assert isinstance(both, Tensor)
        first.extend(both[:, 0].tolist())
        second.extend(both[:, 1].tolist())

    model = trainer.model
    assert isinstance(model, nn.Module)
    hook = model.register_forward_hook(collect, with_kwargs=True)
    try:
        yield scores
        by_row = task.metrics[metric].by_row
        scores.items = by_row(first, second) if by_row else first
        scores.weights = second if task.weighted and not by_row else None
    finally:
        hook.remove()
