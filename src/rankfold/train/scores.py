"""Collects one score per row from the forward passes of the trainer's own evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.tasks.task import Task


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


class Collector:
    """The scores of the rows of one evaluation, batch by batch, for every metric of the task that is made of them."""

    def __init__(self, task: Task, trainer: Any):
        self.task, self.trainer = task, trainer
        self.metrics = [name for name, metric in task.metrics.items() if metric.of_rows]
        self._batches: list[Tensor] = []  # rows × metrics × 2

    @contextmanager
    def batch(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Takes the scores of one batch off the model's outputs while the context is open.

        Args:
            inputs: the batch as the trainer gets it.
        """
        outputs: list[Any] = []
        kept = dict(inputs)  # a trainer takes out the labels that it makes a loss of itself
        model = self.trainer.model
        assert isinstance(model, nn.Module)
        hook = model.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            yield
        finally:
            hook.remove()
        if self.metrics:
            last = outputs[-self.task.passes :]
            pairs = [self.task.scores(last, kept, name, self.trainer) for name in self.metrics]
            found = torch.stack([torch.stack([a.double(), b.double()], 1) for a, b in pairs], 1)
            found = self.trainer.accelerator.gather_for_metrics(found)
            assert isinstance(found, Tensor)
            self._batches.append(found.cpu())

    def scores(self) -> dict[str, RowScores]:
        """By metric."""
        rows = torch.cat(self._batches) if self._batches else torch.zeros(0, len(self.metrics), 2)
        found = {}
        for number, name in enumerate(self.metrics):
            first, second = rows[:, number].T.tolist()
            by_row = self.task.metrics[name].by_row
            items = by_row(first, second) if by_row else first
            found[name] = RowScores(items, second if self.task.weighted and not by_row else None)
        return found
