"""Learning rates that a comparison adds by itself: it extends a grid until the best rate has a neighbour on either side."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rankfold.compare.file import Extension, Rates
from rankfold.plan.first_rate import beyond


@dataclass(frozen=True)
class RateGrid:
    """The learning rates of one contender.

    Args:
        first: tried in any case.
        most: how many may be added; 0 for a fixed list.
    """

    first: Sequence[float]
    most: int = 0

    @classmethod
    def around(cls, rate: float, most: int) -> RateGrid:
        """A rate and its neighbours in the series 1, 2, 5."""
        return cls([beyond(rate, up=False), rate, beyond(rate, up=True)], most)

    def following(self, tried: Collection[float], ranked: Sequence[float], diverged: bool) -> float | None:
        """The rate to try next, or None where the best one lies inside or enough were added.

        Args:
            tried: all rates, those that failed included.
            ranked: those with a result, the best first.
            diverged: whether training diverged at some rate, which a smaller one may mend where none has a result.
        """
        if len(tried) - len(self.first) >= self.most or not (ranked or diverged):
            return None
        lowest, highest = min(tried), max(tried)
        if ranked and ranked[0] == highest:
            return beyond(highest, up=True)
        return beyond(lowest, up=False) if not ranked or ranked[0] == lowest else None


def given(rates: Rates, a_rate: float) -> RateGrid:
    """The grid of a compare file; `a_rate` stands where it leaves the first rates open."""
    if not isinstance(rates, Extension):
        return RateGrid(rates)
    return RateGrid([a_rate] if rates.extend == "auto" else rates.extend, rates.most)
