"""Which rank comes closest to a budget without exceeding it."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

from peft import PeftConfig
from torch import nn

from rankfold.errors import RankfoldError
from rankfold.plan.cost import Cost, adapted, adapter_parameters, cost, trained
from rankfold.plan.layers import adapted_layers, in_and_out
from rankfold.plan.ranks import Setting, setting


@dataclass(frozen=True)
class Match:
    """A config at a budget.

    Args:
        config: a copy with its rank settings solved.
        cost: what it comes to.
        share: trained / budget, ≤ 1.
        full: the method cannot be larger on this model, so that this is not the budget's doing.
    """

    config: PeftConfig
    cost: Cost
    share: float
    full: bool = False


def match(base: nn.Module, config: PeftConfig, budget: int) -> Match:
    """The rank settings of a config that come closest to a budget without exceeding it.

    The number is the largest that the budget allows: one more exceeds it, is refused by the method, or is more than the matrices'
    own rank. What is held to the
    budget is what the optimiser trains in the adapter, at the start where ranks fall; a head is no part of it. RaSA keeps
    its `shared_rank` (at most r; None stays the paper's max(r/8, 1)); AdaLoRA and dynamic DoRA keep target_r's share of r.

    Args:
        base: as in `cost`.
        budget: trained numbers in the adapter, > 0.

    Raises:
        ValueError: the smallest setting exceeds the budget, the method has no rank to solve for, or cannot run on this
            model; in one sentence.
    """
    found = setting(config)

    first = adapted(base, config)
    counted = {found.value: adapter_parameters(first)}

    refused: set[int] = set()

    def count(n: int) -> int:
        if n not in counted:
            try:
                counted[n] = trained(base, found.at(n))
            except ValueError:  # larger than the method can be, such as CoRA's basis
                refused.add(n)
                counted[n] = sys.maxsize
        return counted[n]

    most = _most(first, found)
    n, full = largest(count, most, budget, guess=found.value)
    full = full or n + 1 in refused
    if n == 0:
        raise RankfoldError(
            f"{type(config).__name__}: even {found.field}=1 trains {count(1):,} numbers, and the budget is {budget:,}"
        )
    solved = found.at(n)
    spent = cost(base, solved)
    return Match(solved, spent, spent.trained / budget, full)


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
    """Where the line through the two points that were counted last meets the budget; beyond all where it does not rise."""
    (n0, c0), (n1, c1) = list(points.items())[-2:]
    slope = (c1 - c0) / (n1 - n0)
    return int(n1 + (budget - c1) // slope) if slope > 0 else sys.maxsize


def _most(model: nn.Module, found: Setting) -> int:
    """The rank of the largest matrix that has the adapter; for a number of entries, all of the smallest matrix."""
    sizes = [in_and_out(layer.get_base_layer()) for layer in adapted_layers(model).values()]  # pyright: ignore
    return max(map(min, sizes), default=1) if found.is_rank else min((a * b for a, b in sizes), default=1)


_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}


def parse_budget(text: str) -> int:
    """A number of parameters.

    >>> parse_budget("1.2M"), parse_budget("300k"), parse_budget("1_200_000")
    (1200000, 300000, 1200000)

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmb]?)", text.strip().replace(",", "").replace("_", "").lower())
    count = round(float(found[1]) * _UNITS[found[2]]) if found else 0
    if count < 1:
        raise RankfoldError(f"{text!r} is no number of parameters, such as 1200000, 1.2M or 300k")
    return count
