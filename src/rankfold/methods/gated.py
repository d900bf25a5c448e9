"""ΔW = s · up · diag(gate) · down with a trainable gate: the forward that SoRA, AdaLoRA and dynamic DoRA have in common.

They differ in first values and in who zeroes entries of the gate, and when; that is in their files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from rankfold.errors import RankfoldError
from rankfold.host.adapter import Adapter, Site, kaiming_
from rankfold.host.config import LowRankConfig
from rankfold.kernel.factors import Factors


class Gated(Adapter):
    def __init__(self, config: LowRankConfig, site: Site, shared: nn.Module | None = None) -> None:
        super().__init__(config, site, shared)
        self.down = nn.Parameter(torch.empty(self.r, site.in_features))
        self.up = nn.Parameter(torch.empty(site.out_features, self.r))
        self.gate = nn.Parameter(torch.empty(self.r, dtype=torch.float32))

    def reset_parameters(self, init: bool | str) -> None:
        if init:
            self.first_values()
        else:
            kaiming_(self.down)
            kaiming_(self.up)
            nn.init.normal_(self.gate)

    def first_values(self) -> None:
        """The paper's first values of down, up and gate; ΔW = 0."""
        raise NotImplementedError(f"{type(self).__name__} must implement first_values()")

    def blocks(self) -> Sequence[Factors]:
        return (Factors(self.down, self.up, self.gate, self.scaling),)

    def alive(self) -> int:
        return int(self.gate.count_nonzero())


@dataclass
class BudgetConfig(LowRankConfig):
    """Of a method whose components compete for a budget over the whole model: where they start, end, and for how long."""

    r: int = field(default=12, metadata={"help": "Rank of every module at the start."})
    target_r: int = field(default=8, metadata={"help": "Mean rank of a module at the end."})
    total_step: int | None = field(default=None, metadata={"help": "Optimiser steps of the run; Trainers tell it."})

    def check(self) -> None:
        super().check()
        self.require("target_r", self.target_r, 1 <= self.target_r <= self.r, f"in 1..r={self.r}")
        steps = self.total_step
        self.require("total_step", steps, steps is None or steps >= 1, "an integer >= 1, or null")

    @classmethod
    def fields_at(cls, r: int) -> dict[str, int]:
        return {"r": math.ceil(1.5 * r), "target_r": r}  # the start that the papers take

    def with_rank(self, n: int) -> Self:
        """The target stays the same share of the start."""
        return self.changed(r=n, target_r=min(max(round(n * self.target_r / self.r), 1), n))

    def at_the_end(self) -> Self:
        return self.changed(r=self.target_r)

    def ranks(self) -> dict[str, int]:
        return {"r": self.r, "target_r": self.target_r}

    def ranks_in_words(self) -> str:
        return f"r {self.r} to {self.target_r}"


def check_budget(config: BudgetConfig, adapters: Sequence[Gated]) -> None:
    """Raises ValueError where the start ranks (`rank_pattern` included) are below the budget."""
    start, goal = sum(a.r for a in adapters), config.target_r * len(adapters)
    if start < goal:
        raise RankfoldError(
            f"{type(config).__name__}: target_r={config.target_r} asks for {goal} ranks over {len(adapters)} modules, which "
            f"start with {start}; choose a smaller target_r or larger ranks"
        )


def lowest(scores: Sequence[Tensor], count: int) -> Iterator[Tensor]:
    """For each vector, the mask (bool) of its entries among the `count` lowest of all vectors together.

    Ties are broken by position, so exactly `count` are named; `S ≤ kthvalue(count)`, as reference codes have it, names
    more where scores tie. Without ties the two are the same.
    """
    flat = on_one_device(scores)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.argsort(stable=True)[:count]] = True
    return (part.to(s.device) for part, s in zip(mask.split([len(s) for s in scores]), scores, strict=True))


def on_one_device(vectors: Sequence[Tensor]) -> Tensor:
    """The vectors in one, where the first of them lies: layers may be spread over devices."""
    return torch.cat([v.to(vectors[0].device) for v in vectors])
