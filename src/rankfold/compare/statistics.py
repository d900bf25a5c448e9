"""What the trials of a comparison say: the rate chosen on validation rows, test means and differences with intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev
from typing import Any, Literal

from rankfold.compare.bootstrap import CONFIDENCE, DRAWS, Array, Draws, interval, simultaneous
from rankfold.compare.cautions import cautions
from rankfold.compare.pareto import front
from rankfold.compare.selection import Sensitivity, Trials, choose, contenders
from rankfold.compare.trial_file import TrialLine
from rankfold.errors import RankfoldError

Verdict = Literal["better", "worse", "no difference shown", "not tested"]
Over = Literal["seeds and rows", "rows", "seeds", "nothing"]


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
    """One method (at one place of the adapters) at its best learning rate. Counts and times are means over the seeds.

    Args:
        name: the label, with the target variant where there are several.
        seeds, tests: the finished seeds at the chosen rate, and the test metric of each.
        failed: seeds that failed or diverged at the chosen rate.
        missing: seeds that other contenders finished and this one was not tried with at its rate.
        validation: mean at the chosen rate, over all of `seeds`.
        test: mean over `seeds`, `deviation` their standard deviation (None for one seed).
        interval: 95 %, for this contender by itself; `over`: what was drawn for it.
        trained, head, stored, folded: numbers; `kept` is the plain LoRA of the components left after training.
        front_trained, front_kept: whether no other has a better test metric with fewer numbers.
        seconds: in optimiser steps.
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
    sensitivity: Sensitivity


@dataclass(frozen=True)
class Difference:
    """Test metric of `a` minus that of `b` over the seeds both finished.

    Args:
        interval: 95 % for all pairs with the reference together, and for all other pairs together.
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
    """Everything the report says in numbers; `to_json` is OUT/analysis.json.

    Args:
        rows: test rows that were drawn, or None where they could not be.
        over: what was drawn for the intervals.
        contenders: in the order of the compare file, those with a finished trial.
        unfinished: names of contenders without one.
        differences: every pair once, earlier contender first.
        reference: the contender the others are held against first: plain LoRA, else the first.
        warnings: sentences a reader must see before the numbers.
        trials: lines; `failures` are those that did not finish.
    """

    metric: str
    greater_is_better: bool
    confidence: float
    draws: int
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
                flipped: Verdict = "worse" if d.verdict == "better" else "better" if d.verdict == "worse" else d.verdict
                turned = None if d.interval is None else (-d.interval[1], -d.interval[0])
                return Difference(a, b, d.seeds, -d.value, turned, flipped)
        return None


def analyse(lines: Sequence[TrialLine], *, reference: str | None = None, seed: int = 0, draws: int = DRAWS) -> Analysis:
    """Select on validation rows, judge on test rows.

    Args:
        reference: name of the contender the others are held against; None for plain LoRA, else the first.
        seed: of the bootstrap's random numbers; equal lines and seed give equal numbers.
        draws: replicates of the bootstrap.

    Raises:
        ValueError: no lines, lines of several metrics, or a reference that is no contender.
    """
    if not lines:
        raise RankfoldError("there are no trials yet; run `rankfold compare` first")
    kinds = {(line.metric, line.greater_is_better) for line in lines}
    if len(kinds) > 1:
        names = ", ".join(sorted(metric for metric, _ in kinds))
        raise RankfoldError(
            f"the trials have several metrics ({names}); compare in one folder only what has one metric"
        )
    metric, greater = kinds.pop()
    groups = contenders(lines)
    several = len({g.where for g in groups}) > 1
    names = {id(g): f"{g.label} · {g.where}" if several else g.label for g in groups}

    chosen: list[tuple[Trials, Sensitivity, list[TrialLine]]] = []
    for group in groups:
        sensitivity = choose(group, greater)
        if sensitivity is not None:
            ended = group.ended[sensitivity.best]
            finished = [ended[s] for s in sorted(ended) if ended[s].test is not None]
            if finished:
                chosen.append((group, sensitivity, finished))
    trials = [line for *_, finished in chosen for line in finished]
    rows = _rows(trials)
    shared = Draws([t.items or [] for t in trials] if rows else [], [t.weights for t in trials], seed=seed, draws=draws)
    place = {id(t): i for i, t in enumerate(trials)}
    all_seeds = {t.seed for t in trials}

    found = []
    for group, sensitivity, finished in chosen:
        tests = [_number(t.test) for t in finished]
        over = _over(len(finished), rows)
        deviations = shared.deviations(tests, [(place[id(t)], 1 / len(tests)) for t in finished] if rows else [])
        tried = {*group.ended[sensitivity.best], *group.failed.get(sensitivity.best, {})}
        found.append(
            Contender(
                name=names[id(group)],
                label=group.label,
                where=group.where,
                method=finished[0].method,
                rate=sensitivity.best,
                seeds=tuple(t.seed for t in finished),
                tests=tuple(tests),
                failed=tuple(sorted(group.failed.get(sensitivity.best, {}))),
                missing=tuple(sorted(all_seeds - tried)),
                validation=_mean(finished, lambda t: t.validation),
                test=fmean(tests),
                deviation=stdev(tests) if len(tests) > 1 else None,
                before=_mean(finished, lambda t: t.before),
                interval=None if over == "nothing" else interval(fmean(tests), deviations),
                over=over,
                **{
                    key: _mean(finished, lambda t, key=key: t.parameters.get(key))
                    for key in ("trained", "head", "stored", "folded", "folded_rank")
                },
                kept=_mean(finished, lambda t: t.kept),
                front_trained=False,
                front_kept=False,
                steps=_mean(finished, lambda t: t.steps),
                seconds=_mean(finished, lambda t: t.seconds),
                tokens_per_second=_mean(finished, lambda t: t.tokens_per_second),
                peak_bytes=_mean(finished, lambda t: t.peak_bytes),
                config=finished[0].config,
                sensitivity=sensitivity,
            )
        )
    found = _with_fronts(found, greater)
    failures = _failures(groups, names)
    held = _reference(found, reference)
    by_name = {names[id(g)]: {t.seed: t for t in finished} for g, _, finished in chosen}
    named = {c.name for c in found}
    analysis = Analysis(
        metric=metric,
        greater_is_better=greater,
        confidence=CONFIDENCE,
        draws=draws,
        rows=rows,
        over=_over(max((len(c.seeds) for c in found), default=0), rows),
        contenders=tuple(found),
        unfinished=tuple(names[id(g)] for g in groups if names[id(g)] not in named),
        differences=tuple(_differences(by_name, shared, place if rows else None, greater, held)),
        reference=held,
        warnings=(),
        trials=len(lines),
        failures=tuple(failures),
    )
    return dataclasses.replace(analysis, warnings=tuple(cautions(analysis, lines, trials)))


def _number(value: float | None) -> float:
    assert value is not None
    return value


def _mean(lines: Sequence[TrialLine], read: Callable[[TrialLine], float | None]) -> float | None:
    values = [value for line in lines if (value := read(line)) is not None]
    return fmean(values) if values else None


def _over(seeds: int, rows: int | None) -> Over:
    if seeds > 1:
        return "seeds and rows" if rows else "seeds"
    return "rows" if rows and seeds else "nothing"


def _rows(trials: Sequence[TrialLine]) -> int | None:
    """How many test rows there are to draw, None where they do not make up the metric or differ between trials."""
    counts = {len(t.items) if t.items else 0 for t in trials}
    if len(counts) != 1 or 0 in counts:
        return None
    for t in trials:
        items, weights = t.items or [], t.weights or [1.0] * len(t.items or [])
        if any(x is None for x in items) or len(weights) != len(items) or sum(weights) <= 0:
            return None
        mean = sum(w * x for w, x in zip(weights, items, strict=True)) / sum(weights)
        # Tight, as macro F1 is near the mean of right and wrong where classes are even, but is not that mean
        if not math.isclose(mean, _number(t.test), rel_tol=2e-5, abs_tol=1e-7):
            return None
    return counts.pop()


def _differences(
    trials: dict[str, dict[int, TrialLine]],
    shared: Draws,
    place: dict[int, int] | None,
    greater: bool,
    reference: str | None,
) -> list[Difference]:
    """Every pair; the pairs with the reference hold together, and so do all others: fewer at a time are shorter."""
    found: dict[tuple[str, str], Difference] = {}
    for family in (True, False):
        tested: list[tuple[Difference, Array]] = []
        for a, b in combinations(trials, 2):
            seeds = sorted(trials[a].keys() & trials[b].keys())
            if (reference in (a, b)) is not family or not seeds:
                continue
            values = [_number(trials[a][s].test) - _number(trials[b][s].test) for s in seeds]
            drawn = []
            if place is not None:
                signs = ((a, 1.0), (b, -1.0))
                drawn = [(place[id(trials[n][s])], sign / len(seeds)) for s in seeds for n, sign in signs]
            found[a, b] = Difference(a, b, tuple(seeds), fmean(values), None, "not tested")
            if drawn or len(seeds) > 1:
                tested.append((found[a, b], shared.deviations(values, drawn)))
        intervals = simultaneous([d.value for d, _ in tested], [deviations for _, deviations in tested])
        for (d, _), (low, high) in zip(tested, intervals, strict=True):
            better: Verdict = "better" if (low > 0) == greater else "worse"
            verdict: Verdict = "no difference shown" if low <= 0 <= high else better
            found[d.a, d.b] = dataclasses.replace(d, interval=(low, high), verdict=verdict)
    return [found[pair] for pair in combinations(trials, 2) if pair in found]


def _with_fronts(found: list[Contender], greater: bool) -> list[Contender]:
    for cost, flag in (("trained", "front_trained"), ("kept", "front_kept")):
        known = [c for c in found if getattr(c, cost) is not None]
        marks = front([getattr(c, cost) for c in known], [c.test for c in known], greater)
        on = {c.name for c, mark in zip(known, marks, strict=True) if mark}
        found = [dataclasses.replace(c, **{flag: c.name in on}) for c in found]
    return found


def _reference(found: Sequence[Contender], asked: str | None) -> str | None:
    if asked is not None:
        if asked not in {c.name for c in found}:
            raise RankfoldError(f"reference '{asked}' is no contender; there are {', '.join(c.name for c in found)}")
        return asked
    for method in ("peft:lora", "lora"):
        for c in found:
            if c.method == method and not c.config.get("use_dora") and not c.config.get("use_rslora"):
                return c.name
    return found[0].name if found else None


def _failures(groups: Sequence[Trials], names: dict[int, str]) -> list[Failure]:
    return [
        Failure(names[id(g)], rate, seed, line.rung, line.status, line.reason or "no reason was recorded")
        for g in groups
        for rate in sorted(g.failed)
        for seed, line in sorted(g.failed[rate].items())
    ]
