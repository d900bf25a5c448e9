"""Dynamic DoRA: a LoRA as r rank-1 components with one scalar each; the components that carry the least of their matrix's
update lose it, on a schedule that starts slowly. Not the weight-decomposed DoRA (2402.09353).

Paper: Dynamic Rank Distribution, arXiv 2405.17357 (ACL 2024); its body could not be read, so all of this is the authors' code:
scores q_i = ‖c_i B_i A_i‖_F / ‖ΔW‖_F, smoothed (0.9) and ranked across matrices; cuts between 15 % and 50 % of training along
a cubic; the DEM loss, a penalty on the variance of every row of A and column of B, until the cuts end; A and B Kaiming (a = 0),
c = 0, scale α/r of the start rank. Norms come from r×r products, never from an r×out×in tensor (the code's does).
Ours: exactly m components fall, ties broken by position; steps are optimiser steps (the code counts micro-batches); a run
too short for one cut is refused (the code divides by zero); the DEM gradient is added after the loop's clipping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankfold.control.controller import Controller, finite, run_length
from rankfold.control.sharded import whole, zero_
from rankfold.errors import RankfoldError
from rankfold.host.adapter import kaiming_
from rankfold.host.registry import Method, register
from rankfold.methods.gated import BudgetConfig, Gated, check_budget, lowest, on_one_device


@dataclass
class DynamicDoraConfig(BudgetConfig):
    """Dynamic DoRA (arXiv 2405.17357).

    Args:
        r: rank of every module at the start; the authors take 1.5 × target_r.
        target_r: mean rank at the end, 1 ≤ target_r ≤ r.
        dem_weight: η, weight of the variance penalty while ranks are cut.
        interval: steps between two cuts.
        beta: smoothing of the scores.
        start, end: the share of training before the first cut, and after the last.
        total_step: optimiser steps of the run; needed only in a loop that does not tell `attach`.
    """

    method: ClassVar[str] = "dynamic_dora"
    lora_dropout: float = field(default=0.1, metadata={"help": "Dropout on the adapter's input while training."})
    dem_weight: float = field(default=0.1, metadata={"help": "eta: weight of the variance penalty."})
    interval: int = field(default=100, metadata={"help": "Steps between two cuts."})
    beta: float = field(default=0.9, metadata={"help": "Smoothing of the scores."})
    start: float = field(default=0.15, metadata={"help": "Share of training before the first cut."})
    end: float = field(default=0.5, metadata={"help": "Share of training after the last cut."})

    def check(self) -> None:
        super().check()
        self.require("dem_weight", self.dem_weight, self.dem_weight >= 0, "a number >= 0")
        self.require("interval", self.interval, self.interval >= 1, "an integer >= 1")
        self.require("beta", self.beta, 0 <= self.beta < 1, "in [0, 1)")
        self.require("start", self.start, self.start >= 0 and self.end >= 0 and self.start + self.end < 1, "such that start + end < 1")  # fmt: skip


class DynamicDora(Gated):
    def first_values(self) -> None:
        kaiming_(self.down, a=0)
        kaiming_(self.up, a=0)
        nn.init.zeros_(self.gate)  # c

    def shares(self) -> Tensor:
        """q_i: the share of each component in the norm of the matrix's update; the scale cancels."""
        a, b, c = (whole(p).float() for p in (self.down, self.up, self.gate))
        scaled = c[:, None] * a
        norm = ((b.T @ b) * (scaled @ scaled.T)).sum().clamp_min(0).sqrt()  # ‖B diag(c) A‖_F
        return c.abs() * b.norm(dim=0) * a.norm(dim=1) / (norm + 1e-8)


def cut(tau: int, tau_max: int, surplus: int) -> int:
    """How many of the `surplus` components are out after τ of τ_max steps of cutting: cubic, slow first."""
    return int(surplus * (tau / tau_max) ** 3)


class DynamicDoraController(Controller[DynamicDora, DynamicDoraConfig]):
    penalises_factors = True

    def __init__(self, config: DynamicDoraConfig, adapters: Sequence[DynamicDora], total_steps: int | None) -> None:
        super().__init__(config, adapters, run_length(config, total_steps))
        assert self.total_steps is not None
        check_budget(config, self.adapters)
        self.tau_max = int(self.total_steps * (1 - config.start - config.end))
        if self.tau_max < 1:
            raise RankfoldError(
                f"DynamicDoraConfig: start={config.start} and end={config.end} leave no step to cut ranks in a run of "
                f"{self.total_steps}; train longer or make them smaller"
            )
        self.state |= {
            "S": [torch.zeros(a.r, device=a.gate.device) for a in self.adapters],  # smoothed scores
            "final": [torch.zeros(a.r, device=a.gate.device, dtype=torch.bool) for a in self.adapters],  # out for good
        }
        self._overdue = False

    def load_state(self, state: dict[str, Any]) -> None:
        """As any controller's. Where the run that goes on is shorter, the last cut may be behind it and not made: the next step makes it."""
        super().load_state(state)
        self._overdue = self.tau(self.step) >= self.tau_max and not any(final.any() for final in self.state["final"])

    def tau(self, t: int) -> int:
        """Steps since cutting began, at 1-based step t."""
        assert self.total_steps is not None
        return int(t - self.config.start * self.total_steps)

    def extra_loss(self) -> Tensor | None:
        if not self.config.dem_weight or self.tau(self.step + 1) > self.tau_max:
            return None
        spread = [
            m for a in self.adapters for m in (whole(a.down), whole(a.up).T) if m.shape[1] > 1
        ]  # one entry has no variance
        return self.config.dem_weight * on_one_device([m.var(dim=1) for m in spread]).mean() if spread else None

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        for a in self.adapters:
            if a.gate.grad is not None:  # now, while the weights are still good
                finite(f"Dynamic DoRA: the gradient of gate at {a.site.name}", a.gate.grad)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        c, tau = self.config, self.tau_max if self._overdue else self.tau(self.step)
        self._overdue = False
        if tau <= self.tau_max:
            for adapter, s in zip(self.adapters, self.state["S"], strict=True):
                q = finite(f"Dynamic DoRA: the share of components at {adapter.site.name}", adapter.shares())
                s.mul_(c.beta).add_(q, alpha=1 - c.beta)
            if tau >= 0 and (tau % c.interval == 0 or tau == self.tau_max):
                surplus = sum(a.r for a in self.adapters) - c.target_r * len(self.adapters)
                # the authors' code cuts one even at τ = 0, where the cubic says none
                count = max(cut(tau, self.tau_max, surplus), 1) if surplus > 0 else 0
                out = list(lowest(self.state["S"], count))
                for adapter, mask in zip(self.adapters, out, strict=True):
                    zero_(adapter.gate, mask)
                if tau == self.tau_max:
                    for final, mask in zip(self.state["final"], out, strict=True):
                        final.copy_(mask)
        else:
            for adapter, final in zip(self.adapters, self.state["final"], strict=True):
                zero_(adapter.gate, final)

    def finished(self) -> bool:
        return self.tau(self.step) >= self.tau_max


DYNAMIC_DORA = register(
    Method(
        name="dynamic_dora",
        title="Dynamic DoRA",
        paper="2405.17357",
        summary="Rank-1 components compete by their share of the update's norm; the least are cut, slowly first.",
        config=DynamicDoraConfig,
        adapter=DynamicDora,
        controller=DynamicDoraController,
        folds_at="components left, per layer",
        example={"r": 12, "target_r": 8, "interval": 10, "lora_dropout": 0.0, "lora_alpha": 24},
    )
)
