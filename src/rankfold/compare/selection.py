"""Chooses each contender's learning rate, on validation rows alone, and measures how much depends on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

from rankfold.compare.trial_file import TrialLine

Edge = Literal["lowest", "highest", "only"]


@dataclass(frozen=True)
class RatePoint:
    """One learning rate of one contender, on validation rows.

    Args:
        mean: of the seeds that every rate was tried with; None where none of them finished.
        seeds, values: these seeds, and their validation metric.
        failed: seeds that failed or diverged at this rate.
        rung: where successive halving dropped the rate (its `values` are from there), or None.
        first: mean at the first rung of halving, to which every rate was trained, or None without halving.
    """

    rate: float
    mean: float | None
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    failed: tuple[int, ...]
    rung: int | None = None
    first: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """A contender over its learning rates.

    Args:
        points: by rate, the smallest first.
        best: the chosen rate.
        seeds: that the choice was made with: those that every rate in question was tried with.
        edge: which edge of the rates tried the best one is, "only" for a single rate, or None.
        steps_to_edge: rates tried beyond the best one, on the nearer side.
        added: of the rates, how many were added because the best one was at an edge; None for a fixed list.
        spread: best mean minus worst, as a positive number; with halving at its first rung, else at the end. None for one rate.
    """

    points: tuple[RatePoint, ...]
    best: float
    seeds: tuple[int, ...]
    edge: Edge | None
    steps_to_edge: int
    spread: float | None
    added: int | None = None


@dataclass
class Trials:
    """The trials of one contender.

    Args:
        ended: by rate and seed, trials that were trained to the end.
        failed: by rate and seed, trials that failed or diverged.
        rungs, firsts: by rate and seed, the last and the first rung that halving measured.
    """

    label: str
    where: str
    ended: dict[float, dict[int, TrialLine]] = field(default_factory=dict)
    failed: dict[float, dict[int, TrialLine]] = field(default_factory=dict)
    rungs: dict[float, dict[int, TrialLine]] = field(default_factory=dict)
    firsts: dict[float, dict[int, TrialLine]] = field(default_factory=dict)

    @property
    def rates(self) -> list[float]:
        """Every rate that was tried, the smallest first."""
        return sorted({*self.ended, *self.failed, *self.rungs})

    @property
    def added(self) -> int | None:
        """How many rates were added to a grid that extends itself; None for a fixed list."""
        groups = (*self.ended.values(), *self.failed.values(), *self.rungs.values())
        return max((line.added for seeds in groups for line in seeds.values() if line.added is not None), default=None)


def contenders(lines: Sequence[TrialLine]) -> list[Trials]:
    """The trials by contender (label and where), in the order of their first lines.

    Of two lines for the same rate, seed and rung the later one counts.
    """
    found: dict[tuple[str, str], Trials] = {}
    for line in lines:
        trials = found.setdefault((line.label, line.where), Trials(line.label, line.where))
        if line.status != "done":
            # A trial that was tried again and failed is a failure; the line that counts is the last
            trials.ended.get(line.rate, {}).pop(line.seed, None)
            trials.failed.setdefault(line.rate, {})[line.seed] = line
        elif line.rung is not None:
            before = trials.rungs.setdefault(line.rate, {}).get(line.seed)
            if before is None or before.rung is None or before.rung <= line.rung:
                trials.rungs[line.rate][line.seed] = line
            if line.rung == 0:
                trials.firsts.setdefault(line.rate, {})[line.seed] = line
        else:
            trials.failed.get(line.rate, {}).pop(line.seed, None)
            trials.ended.setdefault(line.rate, {})[line.seed] = line
    for trials in found.values():
        trials.ended = {rate: seeds for rate, seeds in trials.ended.items() if seeds}
        trials.failed = {rate: seeds for rate, seeds in trials.failed.items() if seeds}
    return list(found.values())


def choose(trials: Trials, greater_is_better: bool) -> Sensitivity | None:
    """The best rate: fewest failures first, then the best mean validation metric.

    Rates are compared on the seeds that each of them was tried with, so that a rate which was searched with one seed is
    not held against another's mean of three. A rate at which a seed failed is chosen only where no other is left.

    Returns:
        None where no trial was trained to the end.
    """
    if not any(_values(seeds) for seeds in trials.ended.values()):
        return None
    tried = {rate: {*trials.ended[rate], *trials.failed.get(rate, {})} for rate in trials.ended}
    common = set.intersection(*tried.values())
    points = tuple(_point(trials, rate, common) for rate in trials.rates)
    sign = 1 if greater_is_better else -1

    def merit(point: RatePoint) -> tuple[bool, float, float]:
        tried_here = len(common) or len(tried[point.rate])
        failed = [s for s in point.failed if not common or s in common]
        return point.mean is not None, -len(failed) / tried_here, sign * (point.mean or 0.0)

    in_question = [p for p in points if p.rate in trials.ended]
    best = max(in_question, key=merit)
    at_end = [p.mean for p in in_question if p.mean is not None]
    means = [p.first for p in points if p.first is not None] or at_end
    index, last = trials.rates.index(best.rate), len(points) - 1
    return Sensitivity(
        points=points,
        best=best.rate,
        seeds=tuple(sorted(common)),
        edge=_edge(index, last),
        steps_to_edge=min(index, last - index),
        spread=max(means) - min(means) if len(means) > 1 else None,
        added=trials.added,
    )


def _edge(index: int, last: int) -> Edge | None:
    """Which edge of the rates 0 to `last` this index is, if any."""
    if last == 0:
        return "only"
    edges: dict[int, Edge] = {0: "lowest", last: "highest"}
    return edges.get(index)


def _values(lines: dict[int, TrialLine]) -> dict[int, float]:
    return {seed: line.validation for seed, line in sorted(lines.items()) if line.validation is not None}


def _point(trials: Trials, rate: float, common: set[int]) -> RatePoint:
    values, rung = _values(trials.ended.get(rate, {})), None
    if rate not in trials.ended and rate in trials.rungs:
        values = _values(trials.rungs[rate])
        rung = max(line.rung for line in trials.rungs[rate].values() if line.rung is not None)
    elif common:
        values = {seed: value for seed, value in values.items() if seed in common}
    first = _values(trials.firsts.get(rate, {}))
    return RatePoint(
        rate=rate,
        mean=fmean(values.values()) if values else None,
        seeds=tuple(values),
        values=tuple(values.values()),
        failed=tuple(sorted(trials.failed.get(rate, {}))),
        rung=rung,
        first=fmean(first.values()) if first else None,
    )
