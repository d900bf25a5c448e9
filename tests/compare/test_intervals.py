"""The intervals against known answers, and against the truth of simulated comparisons."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from rankfold.compare.intervals import Rows, _pooled, alone, critical, together


def paired_t(values: list[float]) -> float:
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))


# --- critical values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freedom", [1.0, 2.0, 3.7, 30.0])
def test_one_comparison_is_students_t(freedom: float) -> None:
    assert critical(1, freedom) == pytest.approx(stats.t.ppf(0.975, freedom))


def test_with_a_known_variance_it_is_sidaks() -> None:
    assert critical(7, 1e6) == pytest.approx(stats.norm.ppf((1 + 0.95 ** (1 / 7)) / 2), rel=1e-4)


@pytest.mark.parametrize(("count", "freedom"), [(2, 1.0), (7, 1.0), (7, 3.5), (66, 2.0), (66, 99.0)])
def test_the_largest_of_many_with_one_estimate_of_variance(count: int, freedom: float) -> None:
    rng = np.random.default_rng(0)
    largest = np.abs(rng.normal(size=(40_000, count))).max(1) / np.sqrt(rng.chisquare(freedom, 40_000) / freedom)
    held = float((largest <= critical(count, freedom)).mean())
    assert held == pytest.approx(0.95, abs=4 * math.sqrt(0.0475 / 40_000))


# --- rows ---------------------------------------------------------------------------------------------------------------


def test_rows_alone_match_the_binomial() -> None:
    rows = Rows(np.array([[1.0] * 300 + [0.0] * 100]))
    half = alone([0.75], rows.variance([0]), rows.freedom)
    assert half == pytest.approx(1.966 * math.sqrt(0.75 * 0.25 / 399), rel=1e-3)


def test_weights_are_those_of_the_metric() -> None:
    """Rows with no weight have no say, and doubling all weights changes nothing."""
    rows = Rows(np.array([[1.0, 0.0, 5.0], [1.0, 0.0, 9.0]]), np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0]]))
    assert rows.variance([0]) == pytest.approx(rows.variance([1]))


def test_a_trial_in_which_no_row_counts_is_0_whatever_the_rows() -> None:
    """The precision of a model that finds nothing."""
    rows = Rows(np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), np.array([[1.0, 1.0, 2.0], [0.0, 0.0, 0.0]]))
    assert rows.variance([1]) == 0
    assert rows.variance([0], [1]) == pytest.approx(rows.variance([0]))


def test_only_what_rows_do_to_every_seed_counts() -> None:
    """The noise of single scores is in the spread of the seeds already; counted twice, intervals are too long."""
    rng = np.random.default_rng(0)
    common, seeds, count = rng.normal(0, 0.5, 4000), 4, 4000
    scores = common + rng.normal(0, 1, (seeds, count))
    assert Rows(scores).variance(range(seeds)) == pytest.approx(0.25 / count, rel=0.15)
    assert Rows(rng.normal(0, 1, (seeds, count))).variance(range(seeds)) < 0.05 / count


def test_what_makes_a_row_hard_for_all_cancels() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 1, 500) + np.zeros((6, 1))
    assert Rows(scores).variance(range(3)) > 0.001
    assert Rows(scores).variance(range(3), range(3, 6)) == pytest.approx(0, abs=1e-12)


# --- seeds --------------------------------------------------------------------------------------------------------------


def test_a_mean_alone() -> None:
    values = [0.80, 0.82, 0.84]
    assert alone(values, None) == pytest.approx(paired_t(values))
    assert alone(values[:1], None) is None
    assert alone(values[:2], None) is None
    assert alone(values[:2], 1e-4, 99) is None, "rows cannot say what two seeds do not know"


def test_two_contenders_are_a_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    tests = {name: dict(enumerate(rng.normal(0.8, 0.01, 5))) for name in "ab"}
    (half,) = together([("a", "b")], tests).values()
    assert half == pytest.approx(paired_t([tests["a"][s] - tests["b"][s] for s in range(5)]))


def test_pairs_with_too_few_common_seeds_have_none() -> None:
    tests = {
        "a": {0: 0.8, 1: 0.9, 2: 0.7},
        "b": {0: 0.6, 1: 0.5, 2: 0.6},
        "c": {2: 0.1, 5: 0.1, 6: 0.2},
        "d": {0: 0.4, 1: 0.5},
    }
    assert set(together(list(combinations(tests, 2)), tests)) == {("a", "b")}


def test_where_nothing_varies_there_is_none() -> None:
    tests = {"a": {0: 0.5, 1: 0.5, 2: 0.5}, "b": {0: 0.75, 1: 0.75, 2: 0.75}}
    assert together([("a", "b")], tests) == {}


def test_equal_spreads_are_pooled_and_unequal_ones_lose_degrees_of_freedom() -> None:
    rng = np.random.default_rng(0)
    many = rng.normal(0, 1, (8, 400))
    variance, freedom = _pooled({str(i): dict(enumerate(row)) for i, row in enumerate(many)}, range(400))
    assert variance == pytest.approx(1, rel=0.1)
    assert freedom == pytest.approx(7 * 399, rel=0.05)
    many[1:] *= 1e-3
    _, freedom = _pooled({str(i): dict(enumerate(row)) for i, row in enumerate(many)}, range(400))
    assert freedom == pytest.approx(399, rel=0.05)


def test_no_interval_is_shorter_than_the_pairs_own() -> None:
    """A contender that jumps about among seven that do not keeps its own length."""
    rng = np.random.default_rng(0)
    tests = {str(i): dict(enumerate(rng.normal(0, 0.1 if i == 3 else 0.001, 4))) for i in range(8)}
    halves = together([("0", str(i)) for i in range(1, 8)], tests)
    for (a, b), half in halves.items():
        assert half >= paired_t([tests[a][s] - tests[b][s] for s in range(4)])


def test_pairs_with_other_seeds_share_the_5_percent() -> None:
    """Two pairs of five seeds and one of four; one interval of all three alone (Šidák's) would be longer."""
    rng = np.random.default_rng(0)
    tests = {str(i): dict(enumerate(rng.normal(0, 1, 5))) for i in range(4)}
    del tests["3"][4]
    halves = together([("0", str(i)) for i in range(1, 4)], tests)
    variance, freedom = _pooled(tests, range(5))
    error = math.sqrt(2 * variance / 5)
    assert halves["0", "2"] == pytest.approx(critical(2, freedom, 1 - 0.05 * 2 / 3) * error)
    assert halves["0", "2"] < critical(1, freedom, 0.95 ** (1 / 3)) * error
    four, freedom = _pooled(tests, range(4))
    assert halves["0", "3"] >= critical(1, freedom, 1 - 0.05 / 3) * math.sqrt(2 * four / 4) - 1e-12


def coverage(seeds: int, spread: float, times: int, rows: int = 300) -> float:
    """How often the interval of a difference holds the true one, 0."""
    rng = np.random.default_rng(seeds)
    held = 0
    for _ in range(times):
        hardness = rng.normal(0, 1.2, rows)
        skill = 1.0 + rng.normal(0, spread, (2, seeds, 1))
        right = (skill + hardness + rng.normal(0, 0.6, (2, seeds, rows)) > 0).astype(float)
        tests = {str(i): dict(enumerate(right[i].mean(1))) for i in range(2)}
        places = {str(i): {s: i * seeds + s for s in range(seeds)} for i in range(2)}
        halves = together([("0", "1")], tests, Rows(right.reshape(-1, rows)), places)
        held += abs(right[0].mean() - right[1].mean()) <= halves["0", "1"]
    return held / times


@pytest.mark.parametrize(("seeds", "spread"), [(3, 0.15), (3, 0.0), (5, 0.1), (10, 0.3)])
def test_one_pair_alone(seeds: int, spread: float) -> None:
    """What is promised and not much more, within three errors of 600 simulations (0.9 points each)."""
    assert 0.95 - 0.027 <= coverage(seeds, spread, 600) <= 0.99
