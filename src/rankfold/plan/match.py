"""Which rank comes closest to a budget without exceeding it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from peft import PeftConfig
from torch import nn

from rankfold.plan.cost import Cost, adapted, cost, trained
from rankfold.plan.layers import adapted_layers, in_and_out
from rankfold.plan.ranks import setting


@dataclass(frozen=True)
class Match:
    """A config at a budget.

    Args:
        config: a copy with its rank settings solved.
        cost: what it comes to.
        share: trained / budget, ≤ 1.
    """

    config: PeftConfig
    cost: Cost
    share: float


def match(base: nn.Module, config: PeftConfig, budget: int) -> Match:
    """The rank settings of a config that come closest to a budget without exceeding it.

    The number is the largest that the budget allows: one more exceeds it, or is more than the matrices' own rank. What is held to the
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

    def count(n: int) -> int:
        return trained(base, found.at(n))

    most = _full_rank(base, found.at(1)) if found.is_rank else budget
    n = largest(count, most, budget, guess=found.value)
    if n == 0:
        raise ValueError(
            f"{type(config).__name__}: even {found.field}=1 trains {count(1):,} numbers, and the budget is {budget:,}"
        )
    solved = found.at(n)
    spent = cost(base, solved)
    return Match(solved, spent, spent.trained / budget)


def largest(count: Callable[[int], int], most: int, budget: int, guess: int) -> int:
    """The largest n in 1..most with count(n) ≤ budget, or 0; `count` must not fall. A straight line takes four counts."""
    inside, outside = 0, most + 1
    points = [(0, 0)]
    n = min(max(guess, 1), most)
    for step in range(most.bit_length() + 10_000):
        spent = count(n)
        inside, outside = (n, outside) if spent <= budget else (inside, n)
        if outside - inside <= 1:
            break
        points.append((n, spent))
        n = _next(points, budget, inside, outside) if step < 8 else (inside + outside) // 2
    if inside == most and most > 1 and count(most - 1) == count(most):  # a method that is full before its rank is
        full, low, high = count(most), 0, most - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if count(middle) == full else (middle, high)
        return high
    return inside


def _next(points: list[tuple[int, int]], budget: int, inside: int, outside: int) -> int:
    """Where the line through the last two points meets the budget, between the bounds."""
    (n0, c0), (n1, c1) = points[-2:]
    slope = (c1 - c0) / (n1 - n0) if n1 != n0 else 0
    meets = int(n1 + (budget - c1) // slope) if slope > 0 else (inside + outside) // 2
    return min(max(meets, inside + 1), outside - 1)


def _full_rank(base: nn.Module, config: PeftConfig) -> int:
    layers = adapted_layers(adapted(base, config))
    return max((min(in_and_out(layer.get_base_layer())) for layer in layers.values()), default=1)  # pyright: ignore


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
        raise ValueError(f"budget={text!r} is no number of parameters; write it as 1200000, 1.2M or 300k")
    return count
