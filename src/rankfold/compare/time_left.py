"""Estimates the time left from what was measured, with no more digits than that justifies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rankfold.compare.trial_list import Trial
from rankfold.text import duration


@dataclass
class Estimate:
    """Measured seconds of a whole trial, by contender and set of layers."""

    measured: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def add(self, trial: Trial, seconds: float) -> None:
        """A finished trial. What starting costs is scaled with its steps too, so short rungs make it too high."""
        self.measured.setdefault(_of(trial), []).append(seconds / trial.share)

    def words(self, left: Sequence[Trial], later: int, workers: int) -> str:
        """The time for trials that are known to follow and for a number of others; "" while nothing was measured.

        A contender that was never timed counts as the fastest to the slowest of the others.
        """
        if not self.measured:
            return ""
        means = {key: sum(values) / len(values) for key, values in self.measured.items()}
        low, high = min(means.values()), max(means.values())
        least = sum(t.share * means.get(_of(t), low) for t in left) + later * low
        most = sum(t.share * means.get(_of(t), high) for t in left) + later * high
        untimed = len({_of(t) for t in left} - means.keys())
        least, most = least / workers, most / workers
        about = (
            duration(least, digits=2)
            if most <= 1.1 * least
            else f"{duration(least, digits=2)} to {duration(most, digits=2)}"
        )
        if untimed:
            many = "1 contender was" if untimed == 1 else f"{untimed} contenders were"
            return f"at least {duration(least, digits=2)} left ({many} not timed yet)"
        return f"about {about} left"


def _of(trial: Trial) -> tuple[str, str]:
    return trial.line.label, trial.line.where
