"""Which rank comes closest to a budget without exceeding it."""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from peft import PeftConfig
from torch import nn

from rankfold.errors import RankfoldError
from rankfold.plan.cost import Cost, adapted, cost
from rankfold.plan.layers import adapted_layers, in_and_out
from rankfold.plan.optimizer import PlannedOptimizer
from rankfold.plan.ranks import Setting, setting
from rankfold.train.budget import count as count_parameters


@dataclass(frozen=True)
class Solved:
    """A config at a budget.

    Args:
        config: a copy with its rank settings solved.
        trained, head: parameters that it trains in the adapter, and in full beside it.
        full: the method cannot be larger on this model, so that this is not the budget's doing.
    """

    config: PeftConfig
    trained: int
    head: int
    full: bool = False


@dataclass(frozen=True)
class Match(Solved):
    """A config at a budget, and all that it costs; `share` is trained / budget, ≤ 1."""

    cost: Cost = field(kw_only=True)
    share: float = field(kw_only=True)


def match(base: nn.Module, config: PeftConfig, budget: int, optimizer: PlannedOptimizer | None = None) -> Match:
    """As `solve`, with the cost of what was found; arguments and errors are the same. `optimizer` as in `cost`."""
    solved = solve(base, config, budget)
    spent = cost(base, solved.config, optimizer)
    return Match(**vars(solved), cost=spent, share=spent.trained / budget)


def solve(base: nn.Module, config: PeftConfig, budget: int) -> Solved:
    """The rank settings of a config that come closest to a budget without exceeding it.

    They belong to the largest n that the budget allows: n + 1 exceeds it, is refused by the method, or is more than the
    matrices' own rank. What is held to the budget is what the optimiser trains in the adapter, at the start where ranks
    fall; a head does not count. What follows from n is the method's affair (`LowRankConfig.with_rank`).

    Args:
        base: as in `cost`.
        budget: trained parameters of the adapter, > 0.

    Raises:
        RankfoldError: the smallest setting exceeds the budget, the method has no rank to solve for, or cannot run on this
            model; in one sentence.
    """
    found = setting(config)
    first = adapted(base, config)
    counted = {found.value: count_parameters(first)}
    refused: set[int] = set()

    def count(n: int) -> int:
        if n not in counted and n not in refused:
            try:
                counted[n] = count_parameters(adapted(base, found.at(n)))
            except ValueError:  # more than the method can have
                refused.add(n)
        return counted[n].adapter if n in counted else sys.maxsize

    most = _most(first, found)
    n, full = largest(count, most, budget, guess=found.value)
    full = full or n + 1 in refused
    if n == 0:
        raise RankfoldError(
            f"{type(config).__name__}: even {found.field}=1 trains {count(1):,} parameters, and the budget is {budget:,}"
        )
    return Solved(found.at(n), counted[n].adapter, counted[n].head, full)


def largest(count: Callable[[int], int], most: int, budget: int, guess: int) -> tuple[int, bool]:
    """The largest n in 1..most with count(n) ≤ budget, or 0, and whether none in 1..most exceeds it.

    `count` must not fall; where it stops rising, the first n that has its last value is taken. A straight line takes four
    counts.
    """
    inside, outside = 0, most + 1
    points = {0: 0}
    n = min(max(guess, 1), most)
    for step in itertools.count():
        points[n] = count(n)
        inside, outside = (n, outside) if points[n] <= budget else (inside, n)
        if outside - inside <= 1:
            break
        n = _meets(points, budget) if step < 8 else (inside + outside) // 2
        n = min(max(n, inside + 1), outside - 1)
    if inside < most:
        return inside, False
    high = min(m for m in points if points[m] == points[inside])
    low = max(m for m in points if m < high)
    while high - low > 1:
        middle = (low + high) // 2
        points[middle] = count(middle)
        low, high = (low, middle) if points[middle] == points[inside] else (middle, high)
    return high, True


def _meets(points: dict[int, int], budget: int) -> int:
    """Where the line through the last two counted points meets the budget; infinite if the line does not rise."""
    (n0, c0), (n1, c1) = list(points.items())[-2:]
    slope = (c1 - c0) / (n1 - n0)
    return int(n1 + (budget - c1) // slope) if slope > 0 else sys.maxsize


def _most(model: nn.Module, found: Setting) -> int:
    """The rank of the largest matrix that has the adapter; for a number of entries, all of the smallest matrix."""
    sizes = [in_and_out(layer) for layer in adapted_layers(model).values()]
    return max(map(min, sizes), default=1) if found.is_rank else min((a * b for a, b in sizes), default=1)


_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}


def parse_budget(text: str) -> int:
    """A number of parameters.

    >>> parse_budget("1.2M"), parse_budget("300k"), parse_budget("1_200_000")
    (1200000, 300000, 1200000)

    Raises:
        RankfoldError: it is not one.
    """
    plain = text.strip().lower()
    if re.fullmatch(r"\d{1,3}(,\d{3})+", plain):  # with a unit, as in 1,2M or 1,200M, a comma may be a decimal point
        plain = plain.replace(",", "")
    found = re.fullmatch(r"(\d+(?:_\d+)*(?:\.\d+)?)\s*([kmb]?)", plain)
    count = float(found[1]) * _UNITS[found[2]] if found else 0
    if not 0.5 < count < math.inf:
        raise RankfoldError(f"{text!r} is not a number of parameters, such as 1200000, 1,200,000, 1.2M or 300k")
    return round(count)
