"""What each row adds to macro F1."""

from __future__ import annotations

from collections.abc import Sequence


def macro_f1_by_row(true: Sequence[float], predicted: Sequence[float]) -> list[float]:
    """Scores whose mean over rows is the macro F1 (the mean of the F1 of every class that occurs), and whose variance is, to first
    order, what other rows would do to it.

    A class has F1 = 2·TP/S, where S is how often it is there plus how often it is said: a ratio of two sums over rows. A row's score is the
    macro F1 plus the row's influence on it (the delta method), which for one class is (2·tp − F1·s)·N/S with the row's own tp and s.

    Args:
        true: the class of each row.
        predicted: the class that was said.
    """
    import numpy as np

    t, p = np.asarray(true, dtype=int), np.asarray(predicted, dtype=int)
    classes = 1 + max(t.max(initial=0), p.max(initial=0))
    size = np.bincount(t, minlength=classes) + np.bincount(p, minlength=classes)
    f1 = 2 * np.bincount(t[t == p], minlength=classes) / np.maximum(size, 1)
    occur = max(1, int((size > 0).sum()))
    share = len(t) / np.maximum(size, 1) / occur
    return (f1.sum() / occur + share[t] * (2 * (t == p) - f1[t]) - share[p] * f1[p]).tolist()
