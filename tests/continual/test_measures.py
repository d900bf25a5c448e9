"""The measures on numbers made by hand."""

from __future__ import annotations

import pytest

from rankfold.continual.measures import Measures, backward_transfer, forgetting

MATRIX = [[0.9], [0.6, 0.8], [0.7, 0.5, 1.0]]


def test_accuracies():
    found = Measures.of(MATRIX, greater_is_better=True)
    assert found.averages == pytest.approx([0.9, 0.7, 2.2 / 3])
    assert found.average_anytime == pytest.approx((0.9 + 0.7 + 2.2 / 3) / 3)
    # After task 2: 0.9 - 0.6. After task 3: the best of task 1 was 0.9, of task 2 0.8.
    assert found.forgettings == [None, pytest.approx(0.3), pytest.approx((0.2 + 0.3) / 2)]
    assert found.backward_transfer == pytest.approx((0.7 - 0.9 + 0.5 - 0.8) / 2)


def test_forgetting_counts_from_the_best_and_transfer_from_the_first():
    matrix = [[0.5], [0.9, 0.4], [0.6, 0.4, 0.3]]
    assert forgetting(matrix, greater_is_better=True) == pytest.approx((0.3 + 0.0) / 2)
    assert backward_transfer(matrix, greater_is_better=True) == pytest.approx((0.1 + 0.0) / 2)


def test_of_losses_more_is_forgotten_and_less_is_gained():
    matrix = [[1.0], [1.5, 2.0], [1.2, 1.0, 3.0]]
    assert forgetting(matrix, greater_is_better=False) == pytest.approx((0.2 - 1.0) / 2)
    assert backward_transfer(matrix, greater_is_better=False) == pytest.approx((-0.2 + 1.0) / 2)
    turned = [[-x for x in row] for row in matrix]
    assert forgetting(turned, greater_is_better=True) == forgetting(matrix, greater_is_better=False)


def test_one_task_has_nothing_to_forget():
    found = Measures.of([[0.5]], greater_is_better=True)
    assert (found.forgettings, found.backward_transfer, found.average_anytime) == ([None], None, 0.5)
