"""What a matrix of scores says of tasks learnt in a row.

R[i][j] is the score on task j after training task i, for j ≤ i; both count from 0. Averages are over tasks, each of the same weight.
The signs of forgetting and backward transfer are those of a score where greater is better; for a loss they are turned, so that
forgetting above 0 is always something lost, and backward transfer above 0 something gained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

Matrix = Sequence[Sequence[float]]


def average(row: Sequence[float]) -> float:
    """The mean over the tasks seen so far: ACC of Lopez-Paz and Ranzato 2017 (arXiv 1706.08840) where the row is the last."""
    return fmean(row)


def average_anytime(matrix: Matrix) -> float:
    """The mean over i of the average after task i: AAA, as SD-LoRA's paper (arXiv 2501.13198) reports it."""
    return fmean(average(row) for row in matrix)


def forgetting(matrix: Matrix, greater_is_better: bool) -> float | None:
    """How far earlier tasks fell below the best that they had been: Chaudhry et al. 2018 (arXiv 1801.10112).

    mean over j < k of max_{j ≤ l < k} R[l][j] − R[k][j], for the last k; None for a single task. A task is not measured before it
    was trained, so the maximum begins at l = j.
    """
    last = len(matrix) - 1
    if not last:
        return None
    best = max if greater_is_better else min
    sign = 1 if greater_is_better else -1
    return fmean(sign * (best(matrix[i][j] for i in range(j, last)) - matrix[last][j]) for j in range(last))


def backward_transfer(matrix: Matrix, greater_is_better: bool) -> float | None:
    """How far earlier tasks rose since they were trained: BWT of Lopez-Paz and Ranzato 2017.

    mean over j < k of R[k][j] − R[j][j], for the last k; None for a single task.
    """
    last = len(matrix) - 1
    if not last:
        return None
    sign = 1 if greater_is_better else -1
    return fmean(sign * (matrix[last][j] - matrix[j][j]) for j in range(last))


@dataclass(frozen=True)
class Measures:
    """Everything after the last task that was trained.

    Args:
        averages: after each task.
        forgettings: after each task; None after the first.
    """

    averages: list[float]
    average_anytime: float
    forgettings: list[float | None]
    backward_transfer: float | None

    @classmethod
    def of(cls, matrix: Matrix, greater_is_better: bool) -> Measures:
        return cls(
            averages=[average(row) for row in matrix],
            average_anytime=average_anytime(matrix),
            forgettings=[forgetting(matrix[: k + 1], greater_is_better) for k in range(len(matrix))],
            backward_transfer=backward_transfer(matrix, greater_is_better),
        )
