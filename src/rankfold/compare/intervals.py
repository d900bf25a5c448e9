"""Intervals of means and differences that allow for other seeds and other test rows, and hold together in families.

The trials are crossed: every contender is trained with the same seeds and measured on the same rows. The mean of S seeds on
N rows can come out otherwise for two reasons, whose parts are estimated apart, each with its own degrees of freedom:

* other seeds: the variance between seeds divided by S. The noise of single rows in single trials is in it already.
* other rows: the covariance of the row scores of two different seeds, divided by N. That is what rows do to every seed alike.

An interval's half length is √((c_S · s_S)² + (c_N · s_N)²) with a critical value for each part, which is exact where one part
rules and on the long side between (Howe 1974). `together` says how differences share their variance and their critical value.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

Array = NDArray[np.float64]
Pair = tuple[str, str]

CONFIDENCE = 0.95
#: Two seeds have one degree of freedom, with which a difference must be many times its error to be shown.
LEAST_SEEDS = 3


class Rows:
    """How the metrics of trials move together when the test rows are others.

    Args:
        scores: of the test rows, trials × rows.
        weights: of the rows, trials × rows; None for equal ones. A metric is the weighted mean of its trial's scores, and 0 in a trial
            where no row counts.
    """

    def __init__(self, scores: Array, weights: Array | None = None) -> None:
        weights = np.ones_like(scores) if weights is None else weights
        total = weights.sum(1, keepdims=True)
        total = np.where(total > 0, total, 1.0)
        mean = (weights * scores).sum(1, keepdims=True) / total
        # What each row adds to the metric, to first order: exact for equal weights, the delta method for others
        count = scores.shape[1]
        influence = weights * (scores - mean) / total * count
        self.freedom = max(1, count - 1)
        self._covariance = influence @ influence.T / (count * self.freedom)

    def variance(self, indices: Sequence[int], minus: Sequence[int] = ()) -> float:
        """Of a mean over seeds, or of a difference of two.

        Args:
            indices: of the trials among `scores`, one per seed.
            minus: of those that are subtracted, in the same order of seeds.
        """
        a, c = np.asarray(indices), self._covariance
        each = c[np.ix_(a, a)]
        if len(minus):
            b = np.asarray(minus)
            each = each - c[np.ix_(a, b)] - c[np.ix_(b, a)] + c[np.ix_(b, b)]
        if len(a) == 1:
            return float(each[0, 0])
        between = (each.sum() - np.trace(each)) / (len(a) * (len(a) - 1))
        return max(0.0, float(between))


@lru_cache(maxsize=4096)
def critical(comparisons: int, freedom: float, confidence: float = CONFIDENCE) -> float:
    """How many standard errors `comparisons` intervals with one estimate of variance reach to hold together.

    The quantile of the studentised maximum modulus, which by Šidák's inequality is enough whatever the correlations of the
    differences (Hochberg's GT2). For one comparison it is Student's.
    """
    if comparisons == 1:
        return float(stats.t.ppf((1 + confidence) / 2, freedom))
    middles = (np.arange(1000) + 0.5) / 1000
    roots = np.sqrt(stats.chi2.ppf(middles, freedom) / freedom)

    def short(value: float) -> float:
        return float(np.mean((2 * special.ndtr(value * roots) - 1) ** comparisons)) - confidence

    longest = stats.t.ppf(1 - (1 - confidence) / (2 * comparisons), freedom)  # Bonferroni's
    return float(optimize.root_scalar(short, bracket=(1.0, 1.01 * longest), xtol=1e-6).root)


def alone(tests: Sequence[float], row_variance: float | None, row_freedom: int = 1) -> float | None:
    """Half length of the interval of one mean over seeds; None where two seeds, or nothing at all, would have to tell it.

    Args:
        tests: the metric for each seed. With one, the interval is that of the one model on other rows.
        row_variance: of their mean, or None where the row scores do not make up the metric.
    """
    count = len(tests)
    if 1 < count < LEAST_SEEDS or (count == 1 and row_variance is None):
        return None
    square = 0.0
    if count > 1:
        square = critical(1, count - 1) ** 2 * float(np.var(tests, ddof=1)) / count
    if row_variance is not None:
        square += critical(1, row_freedom) ** 2 * row_variance
    return math.sqrt(square)


def together(
    pairs: Sequence[Pair],
    tests: Mapping[str, Mapping[int, float]],
    rows: Rows | None = None,
    indices: Mapping[str, Mapping[int, int]] | None = None,
) -> dict[Pair, float]:
    """Half lengths of the intervals of differences that hold together: with probability `CONFIDENCE` not one misses.

    The variance between seeds is pooled over all contenders that finished a pair's seeds, as in Tukey's and Dunnett's
    procedures, but with the degrees of freedom of Greenhouse and Geisser, which fall from (S−1)(C−1) to S−1 as the spreads of the
    contenders become unequal. Where pairs have different common seeds there are several such estimates, and each pair has its share of
    the 5 % (Bonferroni). A pair whose own variance is larger than the pooled one keeps its own, and no interval is shorter than
    the pair's own paired t interval.

    Args:
        pairs: of contenders, one family.
        tests: by contender and seed, of all contenders.
        rows: the row scores; `indices` holds each trial's index in them, by contender and seed. None where the row scores do not make
            up the metric.

    Returns:
        By pair; a pair with fewer than `LEAST_SEEDS` common seeds, or of which nothing varies, has none.
    """
    shared = {(a, b): tuple(sorted(tests[a].keys() & tests[b].keys())) for a, b in pairs}
    tested = {pair: seeds for pair, seeds in shared.items() if len(seeds) >= LEAST_SEEDS}
    sharing = Counter(tested.values())  # how many pairs share each estimate of variance
    pools = {seeds: _pooled(tests, seeds) for seeds in sharing}
    found: dict[Pair, float] = {}
    for (a, b), seeds in tested.items():
        count = len(seeds)
        own = float(np.var([tests[a][s] - tests[b][s] for s in seeds], ddof=1))
        pooled, freedom = pools[seeds]
        # The pairs of one estimate may miss with their share of 5 %, so all may with 5 %, however the estimates depend on each other
        missing = (1 - CONFIDENCE) * sharing[seeds] / len(tested)
        reach = critical(sharing[seeds], freedom, 1 - missing)
        square = max(reach**2 * max(2 * pooled, own), critical(1, count - 1) ** 2 * own) / count
        if rows is not None and indices is not None:
            variance = rows.variance([indices[a][s] for s in seeds], [indices[b][s] for s in seeds])
            square += critical(len(tested), rows.freedom) ** 2 * variance
        if square > 0:
            found[a, b] = math.sqrt(square)
    return found


def _pooled(tests: Mapping[str, Mapping[int, float]], seeds: Sequence[int]) -> tuple[float, float]:
    """Variance of contender × seed over the contenders that finished `seeds`, and its degrees of freedom."""
    table = np.array([[t[s] for s in seeds] for t in tests.values() if t.keys() >= set(seeds)])
    contenders, count = table.shape
    rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    products = rest @ rest.T
    total = float(np.trace(products))
    if total <= 0:
        return 0.0, float(count - 1)
    # Greenhouse and Geisser's epsilon times (S−1)(C−1), rounded down so that simulations meet the same critical values again
    freedom = (count - 1) * total**2 / float((products**2).sum())
    return total / ((contenders - 1) * (count - 1)), math.floor(10 * freedom + 1e-6) / 10
