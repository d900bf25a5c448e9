"""The optimiser of a run, where it is one of rankfold's: what it trains of the model, what it keeps, how the trainer makes it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from rankfold.optim.create import optimizer_cls_and_kwargs
from rankfold.optim.pairs import Split
from rankfold.optim.registry import OptimizerRow
from rankfold.runfile.optimizers import options_of, row_of
from rankfold.runfile.schema import RunFile, Training
from rankfold.text import examples


@dataclass(frozen=True)
class RunOptimizer:
    """One of rankfold's optimisers in a run.

    Args:
        training: the run file's section.
        parts: what is a pair of the adapted model, and what is not.
        state_bytes: of its state after the first step.
    """

    row: OptimizerRow
    training: Training
    parts: Split
    state_bytes: int

    @classmethod
    def of(cls, run: RunFile, model: nn.Module) -> RunOptimizer | None:
        """The optimiser for an adapted model, whose downs are frozen where it does not train them; None for transformers' own.

        Raises:
            RankfoldError: the model has no pairs, or pairs that it cannot train.
        """
        row = row_of(run.training.optimizer)
        if row is None:
            return None
        parts = row.cls.take(model)
        return cls(row, run.training, parts, row.state_bytes_of(model, **options_of(run.training)))

    def for_trainer(self, model: nn.Module) -> tuple[Any, dict[str, Any]]:
        """`optimizer_cls_and_kwargs` of a Trainer."""
        return optimizer_cls_and_kwargs(
            self.row.name, model, lr=self.training.learning_rate, **options_of(self.training)
        )

    def in_words(self) -> str:
        """Which parameters it steps as pairs, and which one by one."""
        pairs, plain = self.parts.pairs, self.parts.plain
        size = sum(p.up.numel() + (p.down.numel() if self.row.cls.trains_down else 0) for p in pairs)
        words = f"{len(pairs)} pairs ({size:,} parameters)"
        if plain:
            count = sum(p.parameter.numel() for p in plain)
            why = [f"{n} × {reason}" for reason, n in Counter(p.why for p in plain if p.why).items()]
            named = [p.name for p in plain if not p.why]
            listed = [*why, *([examples(named)] if named else [])]
            words += f"; by AdamW {', '.join(listed)} ({count:,} parameters)"
        return words


def describe(training: Training, clip: float, optimizer: RunOptimizer | None) -> str:
    """The optimiser of a run in one line.

    Args:
        clip: the norm to which gradients are clipped, or 0.
    """
    given = {**training.optimizer_options, **({"weight_decay": training.weight_decay} if training.weight_decay else {})}
    options = f" ({', '.join(f'{key} {value}' for key, value in given.items())})" if given else ""
    clipping = f"gradients clipped to norm {clip:g}" if clip else "no clipping of gradients"
    groups = f"; {optimizer.in_words()}" if optimizer else ""
    return f"{training.optimizer}{options} at {training.learning_rate:g}, {clipping}{groups}"
