"""A paired bootstrap over seeds and test items, that keeps its promise for few seeds too.

A metric measured with S seeds on N rows can differ next time because of the seeds and because of the rows. A replicate is

    estimate + k · (mean of S seeds drawn with replacement − estimate) + (metric on N rows drawn with replacement − estimate)

where the rows are the same for every seed and every method, because every trial was measured on the same rows, and so are the
drawn seeds and k. k = √(S/(S−1)) · √((S−1)/χ²) with a fresh χ² of S−1 degrees of freedom in each replicate: drawing S seeds from S
understates their variance by (S−1)/S, and S seeds do not tell how large it is (which is Student's reason for t). Without k an interval
of two or three seeds is far too short: tests/compare/test_bootstrap.py measures both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DRAWS = 10_000
CONFIDENCE = 0.95


class Draws:
    """The draws that every contender and every pair of a comparison shares.

    Args:
        items: scores of the test rows, one list a trial, all of one length.
        weights: of the rows, one list a trial; None for equal ones.
        seed: of the random numbers.
        draws: how many replicates.
    """

    def __init__(
        self,
        items: Sequence[Sequence[float]],
        weights: Sequence[Sequence[float] | None],
        *,
        seed: int = 0,
        draws: int = DRAWS,
    ) -> None:
        self.seed, self.draws = seed, draws
        self._seeds: dict[int, Array] = {}
        self._items = self._draw_items(items, weights) if items else np.zeros((draws, 0))

    def deviations(self, values: Sequence[float], trials: Sequence[tuple[int, float]]) -> Array:
        """How far each replicate of a mean over seeds is from the estimate.

        Args:
            values: the metric (or a difference of two) for each seed.
            trials: the items that it was measured on: (place in `items`, factor), whose sum of products is the mean;
                empty where rows are not drawn.
        """
        deviation = self._seed_part(len(values)) @ np.asarray(values, dtype=float)
        for place, factor in trials:
            deviation = deviation + factor * self._items[:, place]
        return deviation

    def _seed_part(self, count: int) -> Array:
        """draws × count: what each seed's value weighs in the deviation."""
        if count not in self._seeds:
            rng = np.random.default_rng([self.seed, 1, count])
            chosen = rng.integers(0, count, (self.draws, count))
            shares = np.zeros((self.draws, count))
            np.add.at(shares, (np.arange(self.draws)[:, None], chosen), 1 / count)
            stretch = np.zeros(self.draws)
            if count > 1:
                stretch = np.sqrt(count / rng.chisquare(count - 1, self.draws))
            self._seeds[count] = stretch[:, None] * (shares - 1 / count)
        return self._seeds[count]

    def _draw_items(self, items: Sequence[Sequence[float]], weights: Sequence[Sequence[float] | None]) -> Array:
        """draws × trials: the metric on drawn rows minus the metric on all."""
        scores = np.asarray(items, dtype=float)
        weight = np.stack([np.ones(scores.shape[1]) if w is None else np.asarray(w, dtype=float) for w in weights])
        rows = scores.shape[1]
        top, bottom = (weight * scores).T, weight.T
        rng = np.random.default_rng([self.seed, 2])
        parts = []
        chunk = max(1, min(self.draws, 2_000_000 // rows))
        for start in range(0, self.draws, chunk):
            size = min(chunk, self.draws - start)
            chosen = rng.integers(0, rows, (size, rows)) + rows * np.arange(size)[:, None]
            counts = np.bincount(chosen.ravel(), minlength=size * rows).reshape(size, rows).astype(float)
            # A draw of nothing but weightless rows has no metric; it counts as the estimate
            below = counts @ bottom
            parts.append(np.divide(counts @ top, below, out=np.full(below.shape, np.nan), where=below > 0))
        whole = top.sum(0) / bottom.sum(0)
        return np.nan_to_num(np.concatenate(parts) - whole, nan=0.0)


def interval(estimate: float, deviations: Array, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Where the middle `confidence` of the replicates lies."""
    low, high = np.quantile(deviations, [(1 - confidence) / 2, (1 + confidence) / 2])
    return estimate + float(low), estimate + float(high)


def simultaneous(
    estimates: Sequence[float], deviations: Sequence[Array], confidence: float = CONFIDENCE
) -> list[tuple[float, float]]:
    """Intervals that hold together: with probability `confidence` not one of them misses.

    Each is its own interval's half length times one factor for all: the quantile of the largest deviation of any of them,
    in half lengths (a bootstrap of the maximum, as Tukey's range is for all pairs).
    """
    low, high = (1 - confidence) / 2, (1 + confidence) / 2
    halves = [float(np.subtract(*np.quantile(d, [high, low]))) / 2 for d in deviations]
    largest = np.zeros(len(deviations[0]) if deviations else 1)
    for deviation, half in zip(deviations, halves, strict=True):
        if half > 0:
            largest = np.maximum(largest, np.abs(deviation) / half)
    factor = max(1.0, float(np.quantile(largest, confidence)))
    return [(e - factor * half, e + factor * half) for e, half in zip(estimates, halves, strict=True)]
