"""What a report says of values that are equal, or nearly zero."""

from __future__ import annotations

from dataclasses import replace

from synthetic import METHODS, lines

from rankfold.compare import wording
from rankfold.compare.statistics import analyse


def test_zero_has_no_minus() -> None:
    assert wording.number(-0.00001) == "0.0000"
    assert wording.signed(-0.00001) == "+0.0000"
    assert wording.between((-0.00001, 0.2), 2, sign=True) == "+0.00 to +0.20"
    assert wording.number(-0.5) == "−0.5000"


def test_a_tie_names_all_that_share_the_best_value() -> None:
    found = analyse(lines(METHODS))
    tied = replace(found, contenders=tuple(replace(c, test=0.80001 + 1e-6 * i) for i, c in enumerate(found.contenders)))
    best, others = tied.ranked[0].name, [c.name for c in tied.ranked[1:]]
    said = wording.answer(tied)
    assert " have the highest test accuracy, 0.8000 each; " in said
    assert f"each; {best} (" in said
    assert all(name in said for name in others)
