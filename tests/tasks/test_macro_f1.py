"""Scores of rows that make up macro F1, against scikit-learn's and against a bootstrap of the rows."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from rankfold.compare.intervals import Rows
from rankfold.tasks.macro_f1 import macro_f1_by_row

SHARES = [0.7, 0.2, 0.1]


def drawn(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    true = rng.choice(3, rows, p=SHARES)
    return true, np.where(rng.random(rows) < 0.7, true, rng.choice(3, rows, p=SHARES))


@pytest.mark.parametrize(
    ("true", "said"),
    [
        ([0, 0, 1, 2], [0, 1, 1, 0]),  # a class that is never said
        ([0, 0, 1], [0, 2, 1]),  # one that is not there
        ([1, 1], [1, 1]),
        ([3, 3, 7], [7, 7, 3]),
    ],
)
def test_their_mean_is_macro_f1(true: list[float], said: list[float]) -> None:
    wanted = f1_score(true, said, average="macro", zero_division=0)  # pyright: ignore[reportArgumentType]
    assert np.mean(macro_f1_by_row(true, said)) == pytest.approx(wanted, abs=1e-12)
    assert macro_f1_by_row([], []) == []


def test_their_variance_is_that_of_macro_f1_over_rows() -> None:
    rng = np.random.default_rng(0)
    true, said = drawn(rng, 800)
    scores = Rows(np.array([macro_f1_by_row(true, said)]))  # pyright: ignore[reportArgumentType]
    picks = rng.integers(0, 800, (2000, 800))
    again = [f1_score(true[i], said[i], average="macro") for i in picks]  # pyright: ignore[reportArgumentType]
    assert scores.variance([0]) == pytest.approx(np.var(again), rel=0.1)


def test_differences_of_two_on_the_same_rows() -> None:
    """What the rows do to both cancels, as in a bootstrap of pairs of rows."""
    rng = np.random.default_rng(1)
    true, said = drawn(rng, 800)
    other = np.where(rng.random(800) < 0.9, said, true)
    scores = Rows(np.array([macro_f1_by_row(true, one) for one in (said, other)]))  # pyright: ignore[reportArgumentType]
    picks = rng.integers(0, 800, (2000, 800))
    each = [[f1_score(true[i], one[i], average="macro") for one in (said, other)] for i in picks]  # pyright: ignore
    assert scores.variance([0], [1]) == pytest.approx(np.var(np.diff(each)), rel=0.1)
    assert scores.variance([0], [1]) < 0.5 * scores.variance([0])
