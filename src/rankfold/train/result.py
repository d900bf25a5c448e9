"""What a run made and measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankfold.tasks import table
from rankfold.text import decimals, size


@dataclass(frozen=True)
class TrainResult:
    """One run; its result.json has the same fields.

    Args:
        output: the run's folder; the adapter is in `adapter` below it.
        metric: the one that chooses the best checkpoint.
        measured_on: the split of `before` and `after`: test, else validation, else none (empty).
        others: by split, what else was measured after training.
        total, trainable, adapter, head: parameters; `head` is what is trained in full beside the adapter.
        live: of `adapter`, trained at a time at most, where the method trains one part after another; else None.
        stored, stored_bytes: of the saved adapter.
        ranks, ranks_at_start: of all modules together, where the method changes them while it trains; else None.
        resumed_at: the step this session began with, or None for a run in one go.
        seconds: spent in optimiser steps of this session.
        best_step: of the checkpoint that was kept, or None for the last one.
    """

    output: str
    model: str
    task: str
    method: dict[str, Any]
    metric: str
    measured_on: str
    before: dict[str, float]
    after: dict[str, float]
    others: dict[str, dict[str, float]]
    total: int
    trainable: int
    adapter: int
    head: int
    stored: int
    stored_bytes: int
    ranks: int | None
    ranks_at_start: int | None
    processes: int
    steps: int
    epochs: float
    best_step: int | None
    resumed_at: int | None
    seconds: float
    samples_per_second: float
    tokens_per_second: float
    peak_memory: int
    labels: list[str]
    notes: list[str]
    command: str
    versions: dict[str, str]
    live: int | None = None

    @property
    def adapter_path(self) -> Path:
        return Path(self.output, "adapter")

    def scores(self) -> list[tuple[str, str, str]]:
        """Metric, before and after, in words; a run that was resumed may not know what was before."""
        return [
            (name, decimals(self.before[name]) if name in self.before else "?", decimals(value))
            for name, value in self.after.items()
        ]

    def ranks_row(self) -> list[tuple[str, str]]:
        """What became of the ranks, as a heading and a value; nothing where no schedule changes them."""
        if not self.ranks_at_start or self.ranks is None:
            return []
        if self.ranks > self.ranks_at_start:
            return [("ranks", f"{self.ranks:,}, grown from {self.ranks_at_start:,}")]
        return [("ranks kept", f"{self.ranks:,} of {self.ranks_at_start:,}")]

    def lines(self) -> list[tuple[str, str]]:
        """The result in words: pairs of a heading and a value."""
        task, speeds = table.get(self.task), []
        if task.counts_rows:
            speeds.append(f"{self.samples_per_second:,.1f} rows a second")
        if task.max_length:
            speeds.append(f"{self.tokens_per_second:,.0f} tokens a second")
        speed = ", ".join(speeds)
        scores = [(f"{self.measured_on} {name}", f"{before} -> {after}") for name, before, after in self.scores()]
        return [
            *scores,
            ("trained", f"{self.trainable:,} parameters (adapter {self.adapter:,}, head {self.head:,})"),
            *self.ranks_row(),
            ("stored", f"{self.stored:,} parameters, {size(self.stored_bytes)}"),
            (
                "steps",
                f"{self.steps:,}" + (f", the best on validation at {self.best_step:,}" if self.best_step else ""),
            ),
            *([("speed", f"{speed}; {self.seconds:,.0f} s in steps")] if self.seconds else []),
            ("peak memory", size(self.peak_memory)),
            ("adapter", str(self.adapter_path)),
        ]
