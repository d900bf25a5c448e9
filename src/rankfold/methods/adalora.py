"""AdaLoRA: P Λ Q with near-orthogonal P and Q; the triplets with the least importance lose their singular value, down to a
budget over the whole model.

Paper: arXiv 2303.10512 (ICLR 2023). From the paper: importance |w·∂L/∂w|, smoothed, times its smoothed uncertainty; a triplet
scores its singular value plus the means of its two vectors; the cubic budget, in the code's form (the paper's Eq. 14 has a
misprint); P, Q ~ N(0, 0.02²), Λ = 0. From the code: the regulariser as a mean of un-squared Frobenius norms (published γ belong
to it) and the scale α/(r + 1e-5), always with the initial rank. Ours: exactly b triplets survive, ties broken by position (the
code's `S ≤ θ` masks more); the last step cuts to the budget whatever tfinal and deltaT say (between cuts, triplets come back);
the regulariser's gradient is added just before the step, after the loop's clipping; resumable.
PEFT's own AdaLoRA is `peft.AdaLoraConfig`; it prunes only if the loop calls `update_and_allocate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from rankfold.control.controller import Controller, finite, run_length
from rankfold.control.sharded import whole, zero_
from rankfold.errors import RankfoldError
from rankfold.host.adapter import Site
from rankfold.host.registry import Method, register
from rankfold.methods.gated import BudgetConfig, Gated, check_budget, lowest, on_one_device


@dataclass
class AdaSvdConfig(BudgetConfig):
    """AdaLoRA (arXiv 2303.10512) as rankfold runs it; the names are those of PEFT's AdaLoraConfig, with r for init_r.

    Args:
        r: rank of every module at the start.
        target_r: mean rank at the end; the budget is target_r × number of modules. 1 ≤ target_r ≤ r.
        tinit, tfinal: steps before the first cut, and steps at the end with the final ranks.
        deltaT: steps between two cuts.
        beta1, beta2: smoothing of importance and of its uncertainty.
        orth_reg_weight: γ, weight of the orthogonality of P and Q.
        total_step: optimiser steps of the run; needed only in a loop that does not tell `attach`.
    """

    method: ClassVar[str] = "adalora"
    tinit: int = field(default=0, metadata={"help": "Steps before the first cut."})
    tfinal: int = field(default=0, metadata={"help": "Steps at the end with the final ranks."})
    deltaT: int = field(default=1, metadata={"help": "Steps between two cuts."})
    beta1: float = field(default=0.85, metadata={"help": "Smoothing of the importance."})
    beta2: float = field(default=0.85, metadata={"help": "Smoothing of the importance's uncertainty."})
    orth_reg_weight: float = field(
        default=0.5, metadata={"help": "gamma: weight of the orthogonality of both factors."}
    )

    def check(self) -> None:
        super().check()
        self.require("use_rslora", self.use_rslora, not self.use_rslora, "false: AdaLoRA's scale is alpha/(r + 1e-5)")
        for name in ("tinit", "tfinal"):
            self.require(name, getattr(self, name), getattr(self, name) >= 0, "an integer >= 0")
        self.require("deltaT", self.deltaT, self.deltaT >= 1, "an integer >= 1")
        for name in ("beta1", "beta2"):
            self.require(
                name,
                getattr(self, name),
                0 < getattr(self, name) < 1,
                "in (0, 1): PEFT asserts it, and at 0 every score is 0",
            )
        self.require("orth_reg_weight", self.orth_reg_weight, self.orth_reg_weight >= 0, "a number >= 0")


class AdaSvd(Gated):
    def __init__(self, config: AdaSvdConfig, site: Site, shared: nn.Module | None = None) -> None:
        super().__init__(config, site, shared)
        self.scaling = self.lora_alpha / (self.r + 1e-5)

    def first_values(self) -> None:
        nn.init.normal_(self.down, std=0.02)  # Q
        nn.init.normal_(self.up, std=0.02)  # P
        nn.init.zeros_(self.gate)  # λ


def budget(t: int, b0: int, bT: int, tinit: int, tfinal: int, total: int, deltaT: int) -> tuple[int, bool]:
    """(triplets to keep after 0-based step t, whether to mask now): cubic, fast first."""
    if t <= tinit:
        return b0, False
    if t > total - tfinal or t >= total - 1:  # also where training goes on behind `total`
        return bT, True
    m = 1 - (t - tinit) / (total - tfinal - tinit)
    return int(bT + (b0 - bT) * m**3), t % deltaT == 0


def importance(i_bar: Tensor, u_bar: Tensor, w: Tensor, grad: Tensor, beta1: float, beta2: float) -> Tensor:
    """s(w) = Ī·Ū after one step of both averages (in place), I = |w·∂L/∂w|."""
    i = (w.to(i_bar.dtype) * grad.to(i_bar.dtype)).abs()  # in half precision small products would all be 0
    i_bar.mul_(beta1).add_(i, alpha=1 - beta1)
    u_bar.mul_(beta2).add_((i - i_bar).abs(), alpha=1 - beta2)
    return i_bar * u_bar


class AdaSvdController(Controller[AdaSvd, AdaSvdConfig]):
    penalises_factors = True

    def __init__(self, config: AdaSvdConfig, adapters: Sequence[AdaSvd], total_steps: int | None) -> None:
        super().__init__(config, adapters, run_length(config, total_steps))
        assert self.total_steps is not None
        c, room = self.config, self.total_steps - config.tfinal - config.tinit
        check_budget(config, self.adapters)
        # t = tinit is the last step before the first cut, and the last step of all is total − 1
        if room <= 0 or c.tinit >= self.total_steps - 1:
            raise RankfoldError(
                f"AdaSvdConfig: tinit={c.tinit} + tfinal={c.tfinal} leave no step to cut ranks in a run of "
                f"{self.total_steps}; choose tinit + tfinal < {self.total_steps} and tinit < {self.total_steps - 1}"
            )
        names = ("down", "up", "gate")
        self.state |= {
            # Ī and Ū of every entry of Q, P, λ
            "I": [{n: _zeros(getattr(a, n)) for n in names} for a in self.adapters],
            "U": [{n: _zeros(getattr(a, n)) for n in names} for a in self.adapters],
        }

    def extra_loss(self) -> Tensor | None:
        if not self.config.orth_reg_weight:
            return None
        norms = []
        for a in self.adapters:
            up, down = whole(a.up), whole(a.down)
            eye = torch.eye(a.r, device=up.device, dtype=up.dtype)
            norms += [torch.linalg.norm(up.T @ up - eye), torch.linalg.norm(down @ down.T - eye)]
        return self.config.orth_reg_weight * on_one_device([norm[None] for norm in norms]).mean()

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        for a in self.adapters:
            for name, p in a.named_parameters():
                if p.grad is not None:  # now, while the weights are still good
                    finite(f"AdaLoRA: the gradient of {name} at {a.site.name}", p.grad)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        c, t, total = self.config, self.step - 1, self.total_steps
        assert total is not None
        if t < total - c.tfinal:  # frozen afterwards, so that the same triplets stay out
            self._update()
        b0, bT = sum(a.r for a in self.adapters), c.target_r * len(self.adapters)
        b, now = budget(t, b0, bT, c.tinit, c.tfinal, total, c.deltaT)
        if now and b < b0:
            for adapter, out in zip(self.adapters, lowest(self._scores(), b0 - b), strict=True):
                zero_(adapter.gate, out)  # P and Q stay: a triplet dropped by mistake can come back

    def _update(self) -> None:
        c = self.config
        for a, i_bar, u_bar in zip(self.adapters, self.state["I"], self.state["U"], strict=True):
            for name in i_bar:
                w: nn.Parameter = getattr(a, name)
                if w.grad is not None:
                    importance(i_bar[name], u_bar[name], whole(w), whole(w.grad), c.beta1, c.beta2)

    def _scores(self) -> list[Tensor]:
        scores = []
        for i, u in zip(self.state["I"], self.state["U"], strict=True):
            s = {name: i[name] * u[name] for name in i}
            scores.append(s["gate"] + s["up"].mean(0) + s["down"].mean(1))
        return scores

    def finished(self) -> bool:
        assert self.total_steps is not None
        # the first step that is sure to cut to the budget is t = total - tfinal + 1, or the last one
        return self.step >= min(self.total_steps, self.total_steps - self.config.tfinal + 2)


def _zeros(p: Tensor) -> Tensor:
    return torch.zeros(p.shape, device=p.device, dtype=torch.promote_types(p.dtype, torch.float32))


ADALORA = register(
    Method(
        name="adalora",
        title="AdaLoRA",
        paper="2303.10512",
        summary="Singular triplets compete for a budget over the whole model; unimportant ones are zeroed on a schedule.",
        config=AdaSvdConfig,
        adapter=AdaSvd,
        controller=AdaSvdController,
        folds_at="triplets left, per layer",
        example={
            "r": 12,
            "target_r": 8,
            "tinit": 20,
            "tfinal": 50,
            "deltaT": 5,
            "orth_reg_weight": 0.1,
            "lora_alpha": 24,
        },
    )
)
