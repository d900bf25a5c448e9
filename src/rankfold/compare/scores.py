"""One score for each row, read off the forward passes of the trainer's own evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.train.trainers import CarefulTrainer


@dataclass
class RowScores:
    """Scores in the order of the rows; the metric is their mean by weight.

    Args:
        items: classification: right or wrong, or the loss; causal-lm: the mean over the row's tokens.
        weights: tokens of each row, or None where all rows count alike.
    """

    items: list[float] = field(default_factory=list)
    weights: list[float] | None = None

    @property
    def mean(self) -> float:
        weights = self.weights or [1.0] * len(self.items)
        return sum(w * x for w, x in zip(weights, self.items, strict=True)) / sum(weights)


@contextmanager
def row_scores(trainer: CarefulTrainer, task: str, metric: str) -> Iterator[RowScores]:
    """Collects what `trainer.evaluate` sees while the context is open.

    Args:
        metric: accuracy, loss or token_accuracy.
    """
    scores = RowScores(weights=[] if task == "causal-lm" else None)
    of_batch = _of_tokens if task == "causal-lm" else _of_classes

    def collect(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        items, weights = of_batch(output, kwargs, metric)
        both = trainer.accelerator.gather_for_metrics(torch.stack([items.double(), weights.double()], 1))
        assert isinstance(both, Tensor)
        scores.items += both[:, 0].tolist()
        if scores.weights is not None:
            scores.weights += both[:, 1].tolist()

    model = trainer.model
    assert isinstance(model, nn.Module)
    hook = model.register_forward_hook(collect, with_kwargs=True)
    try:
        yield scores
    finally:
        hook.remove()


def _of_classes(output: Any, inputs: dict[str, Any], metric: str) -> tuple[Tensor, Tensor]:
    logits, labels = output.logits.detach(), inputs["labels"]
    if metric == "accuracy":
        items = (logits.argmax(-1) == labels).double()
    else:
        items = nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    return items, torch.ones_like(items)


def _of_tokens(output: Any, inputs: dict[str, Any], metric: str) -> tuple[Tensor, Tensor]:
    # TRL's fused head gives, per token and zero where no label is, what its own metrics are made of.
    tokens = output.label_mask.detach().double().sum(1)
    total = (output.is_top1 if metric == "token_accuracy" else -output.log_probs).detach().double().sum(1)
    return total / tokens.clamp(min=1), tokens
