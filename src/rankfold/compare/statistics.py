"""Analyses a comparison's trials: the rate chosen on validation rows, test means, and differences with intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import combinations
from statistics import fmean, stdev

import numpy as np

from rankfold.compare.analysis import Analysis, Contender, Difference, Failure, Over, Verdict
from rankfold.compare.cautions import cautions
from rankfold.compare.intervals import CONFIDENCE, LEAST_SEEDS, Rows, alone, together
from rankfold.compare.pareto import front
from rankfold.compare.selection import Sensitivity, Trials, choose, contenders
from rankfold.compare.trial_file import TrialLine
from rankfold.errors import RankfoldError
from rankfold.tasks.table import bounds_of


def analyse(lines: Sequence[TrialLine], *, reference: str | None = None) -> Analysis:
    """Select on validation rows, judge on test rows.

    Args:
        reference: name of the contender the others are held against; None for plain LoRA, else the first.

    Raises:
        ValueError: no lines, lines of several metrics, or a reference that is not a contender.
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
    scores = _scores(trials) if rows else None
    index = {id(t): i for i, t in enumerate(trials)}
    all_seeds = {t.seed for t in trials}
    most = max((len(finished) for *_, finished in chosen), default=0)

    found = []
    for group, sensitivity, finished in chosen:
        tests = [_number(t.test) for t in finished]
        over = _over(len(finished), most, rows)
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
                interval=None if over == "nothing" else _interval(tests, finished, scores, index, metric),
                over=over,
                **{
                    key: _mean(finished, lambda t, key=key: t.parameters.get(key))
                    for key in ("trained", "live", "head", "stored", "folded", "folded_rank")
                },
                kept=_mean(finished, lambda t: t.kept),
                front_trained=False,
                front_kept=False,
                steps=_mean(finished, lambda t: t.steps),
                seconds=_mean(finished, lambda t: t.seconds),
                tokens_per_second=_mean(finished, lambda t: t.tokens_per_second),
                peak_bytes=_mean(finished, lambda t: t.peak_bytes),
                config=finished[0].config,
                training=finished[0].training,
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
        least_seeds=LEAST_SEEDS,
        rows=rows,
        over=_over(most, most, rows),
        contenders=tuple(found),
        unfinished=tuple(names[id(g)] for g in groups if names[id(g)] not in named),
        differences=tuple(_differences(by_name, scores, index, metric, greater, held)),
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


def _over(seeds: int, most: int, rows: int | None) -> Over:
    """What an interval over `seeds` seeds allows for, where the contender with most of them has `most`."""
    if seeds >= LEAST_SEEDS:
        return "seeds and rows" if rows else "seeds"
    # The interval of one model on other rows would mislead beside those of others that know how much seeds matter
    return "rows" if rows and seeds == most == 1 else "nothing"


def _rows(trials: Sequence[TrialLine]) -> int | None:
    """How many test rows there are to draw, None where they do not make up the metric or differ between trials."""
    counts = {len(t.items) if t.items else 0 for t in trials}
    if len(counts) != 1 or 0 in counts:
        return None
    for t in trials:
        items, weights = t.items or [], t.weights or [1.0] * len(t.items or [])
        if any(x is None for x in items) or len(weights) != len(items) or sum(weights) < 0:
            return None
        mean = sum(w * x for w, x in zip(weights, items, strict=True)) / (sum(weights) or 1.0)
        # Tight: macro F1 is near the mean of right and wrong where classes are even, but is not that mean
        if not math.isclose(mean, _number(t.test), rel_tol=2e-5, abs_tol=1e-7):
            return None
    return counts.pop()


def _scores(trials: Sequence[TrialLine]) -> Rows:
    weights = [t.weights or [1.0] * len(t.items or []) for t in trials]
    return Rows(np.array([t.items for t in trials], dtype=float), np.array(weights, dtype=float))


def _interval(
    tests: Sequence[float], finished: Sequence[TrialLine], scores: Rows | None, index: dict[int, int], metric: str
) -> tuple[float, float] | None:
    variance = scores.variance([index[id(t)] for t in finished]) if scores else None
    half = alone(tests, variance, scores.freedom if scores else 1)
    return None if half is None else _within(fmean(tests), half, bounds_of(metric))


def _within(middle: float, half: float, bounds: tuple[float, float]) -> tuple[float, float]:
    return max(middle - half, bounds[0]), min(middle + half, bounds[1])


def _differences(
    trials: dict[str, dict[int, TrialLine]],
    scores: Rows | None,
    index: dict[int, int],
    metric: str,
    greater: bool,
    reference: str | None,
) -> list[Difference]:
    """Every pair. The intervals against the reference form one family and all others another: smaller families give shorter ones."""
    tests = {name: {s: _number(t.test) for s, t in some.items()} for name, some in trials.items()}
    indices = {name: {s: index[id(t)] for s, t in some.items()} for name, some in trials.items()}
    low, high = bounds_of(metric)
    pairs = list(combinations(trials, 2))
    halves: dict[tuple[str, str], float] = {}
    for family in (True, False):
        halves |= together([p for p in pairs if (reference in p) is family], tests, scores, indices)
    found: list[Difference] = []
    for a, b in pairs:
        seeds = tuple(sorted(tests[a].keys() & tests[b].keys()))
        if not seeds:
            continue
        value = fmean(tests[a][s] - tests[b][s] for s in seeds)
        if (a, b) in halves:
            interval = _within(value, halves[a, b], (low - high, high - low))
            found.append(Difference(a, b, seeds, value, interval, _verdict(interval, greater)))
        else:
            found.append(Difference(a, b, seeds, value, None, "not tested"))
    return found


def _verdict(interval: tuple[float, float], greater: bool) -> Verdict:
    if interval[0] <= 0 <= interval[1]:
        return "no difference shown"
    return "better" if (interval[0] > 0) == greater else "worse"


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
            raise RankfoldError(f"reference '{asked}' is not a contender; there are {', '.join(c.name for c in found)}")
        return asked
    for method in ("peft:lora", "lora"):
        for c in found:
            variant = c.config.get("use_dora") or c.config.get("use_rslora")
            if c.method == method and not variant and c.training.get("optimizer", "adamw").startswith("adamw"):
                return c.name
    return found[0].name if found else None


def _failures(groups: Sequence[Trials], names: dict[int, str]) -> list[Failure]:
    return [
        Failure(names[id(g)], rate, seed, line.rung, line.status, line.reason or "no reason was recorded")
        for g in groups
        for rate in sorted(g.failed)
        for seed, line in sorted(g.failed[rate].items())
    ]
