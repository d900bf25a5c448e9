"""The results of a comparison: every value in the report, the terminal and analysis.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from rankfold.compare.selection import Sensitivity

Verdict = Literal["better", "worse", "no difference shown", "not tested"]
Over = Literal["seeds and rows", "rows", "seeds", "nothing"]

_FLIPPED: dict[Verdict, Verdict] = {
    "better": "worse",
    "worse": "better",
    "no difference shown": "no difference shown",
    "not tested": "not tested",
}


@dataclass(frozen=True)
class Failure:
    """A trial that did not finish: `status` is "failed" or "diverged"."""

    name: str
    rate: float
    seed: int
    rung: int | None
    status: str
    reason: str


@dataclass(frozen=True)
class Contender:
    """One method (with one optimiser, on one set of layers) at its best learning rate. Counts and times are means over the seeds.

    Args:
        name: the label, with the target variant where there are several.
        seeds, tests: the finished seeds at the chosen rate, and the test metric of each.
        failed: seeds that failed or diverged at the chosen rate.
        missing: seeds that other contenders finished and this one was not tried with at its rate.
        validation: mean at the chosen rate, over all of `seeds`.
        test: mean over `seeds`, `deviation` their standard deviation (None for one seed).
        interval: 95 %, for this contender by itself; None where its seeds are too few for one.
        over: what the interval allows to come out otherwise. "rows" is for one seed alone: the one model on other rows.
        trained, head, stored, folded: parameters; `kept` is the plain LoRA of the components left after training, of a chain all its links.
        live: trained at a time, at most, where links or boosters follow each other; else None.
        front_trained, front_kept: whether no other has a better test metric with fewer parameters.
        seconds: in optimiser steps.
        config: the method's fields; `training` the optimiser and its options, where they are its own.
    """

    name: str
    label: str
    where: str
    method: str
    rate: float
    seeds: tuple[int, ...]
    tests: tuple[float, ...]
    failed: tuple[int, ...]
    missing: tuple[int, ...]
    validation: float | None
    test: float
    deviation: float | None
    before: float | None
    interval: tuple[float, float] | None
    over: Over
    trained: float | None
    live: float | None
    head: float | None
    stored: float | None
    folded: float | None
    folded_rank: float | None
    kept: float | None
    front_trained: bool
    front_kept: bool
    steps: float | None
    seconds: float | None
    tokens_per_second: float | None
    peak_bytes: float | None
    config: dict[str, Any]
    training: dict[str, Any]
    sensitivity: Sensitivity


@dataclass(frozen=True)
class Difference:
    """Test metric of `a` minus that of `b` over the seeds both finished.

    Args:
        interval: 95 % for all pairs with the reference together, and for all other pairs together; None with too few common seeds.
        verdict: of `a` against `b`; "no difference shown" where the interval holds 0, "not tested" where there is none.
    """

    a: str
    b: str
    seeds: tuple[int, ...]
    value: float
    interval: tuple[float, float] | None
    verdict: Verdict


@dataclass(frozen=True)
class Analysis:
    """Every value in the report; `to_json` is OUT/analysis.json.

    Args:
        rows: test rows, or None where their scores do not make up the metric.
        over: what the intervals allow to come out otherwise.
        least_seeds: needed for an interval of a difference.
        contenders: in the order of the compare file, those with a finished trial.
        unfinished: names of contenders without one.
        differences: every pair once, earlier contender first.
        reference: the contender the others are held against first: plain LoRA, else the first.
        warnings: sentences a reader must see before the results.
        trials: lines; `failures` are those that did not finish.
    """

    metric: str
    greater_is_better: bool
    confidence: float
    least_seeds: int
    rows: int | None
    over: Over
    contenders: tuple[Contender, ...]
    unfinished: tuple[str, ...]
    differences: tuple[Difference, ...]
    reference: str | None
    warnings: tuple[str, ...]
    trials: int
    failures: tuple[Failure, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def ranked(self) -> list[Contender]:
        """The contenders, the best test mean first."""
        return sorted(self.contenders, key=lambda c: c.test, reverse=self.greater_is_better)

    def difference(self, a: str, b: str) -> Difference | None:
        """`a` minus `b`, whichever of the two comes first in the file."""
        for d in self.differences:
            if (d.a, d.b) == (a, b):
                return d
            if (d.a, d.b) == (b, a):
                turned = None if d.interval is None else (-d.interval[1], -d.interval[0])
                return Difference(a, b, d.seeds, -d.value, turned, _FLIPPED[d.verdict])
        return None
