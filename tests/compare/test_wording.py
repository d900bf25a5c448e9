"""What a report says of values that are equal, or nearly zero."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console
from synthetic import METHODS, Method, lines

from rankfold.compare import wording
from rankfold.compare.statistics import analyse
from rankfold.compare.table import show


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


def test_what_chains_and_boosters_train_at_a_time():
    methods = (Method("LoRA", "lora"), Method("COLA", "cola"), Method("XGBLoRA", "xgblora"))
    live = {"COLA": 338_000, "XGBLoRA": 112_000}
    found = [
        replace(t, parameters=t.parameters | ({"live": live[t.label]} if t.label in live else {}))
        for t in lines(methods, rates=(2e-3,), seeds=(0,), rows=40)
    ]
    lora, cola, boosted = analyse(found).contenders
    assert (lora.live, wording.at_a_time(lora)) == (None, "")
    assert (cola.live, wording.at_a_time(cola)) == (338_000, "at a time")
    assert wording.at_a_time(boosted) == "at most 112,000 at a time"
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(show(analyse(found)))
    text = console.export_text()
    assert "112k of 338k" in text
    assert "XGBLoRA trains 112,000 parameters at a time, at most; kept: what its links add up to" in text
    assert "do not have one budget: 112,000 to 338,000" in text
