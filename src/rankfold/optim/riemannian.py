"""Riemannian-preconditioned LoRA: each factor's gradient is divided by the size of the other factor.

Paper: Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, arXiv 2402.02347.

    g_A ← (BᵀB + λI)⁻¹ g_A        g_B ← g_B (AAᵀ + λI)⁻¹        then SGD or AdamW

From PEFT's code (0.21, peft.optimizers.riemannian): λ = 1e-2, no factor 1/s², the inverse as a pseudo-inverse.
Ours: p.grad is left as it was, so that clipping, logging and controllers read the true gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankfold.optim.adam import adam_on_both_, moments
from rankfold.optim.options import Options, is_number
from rankfold.optim.pair_optimizer import PairOptimizer
from rankfold.optim.registry import OptimizerRow, register
from rankfold.optim.small import gram, inverse
from rankfold.optim.stacks import Batch, Shapes


@dataclass(frozen=True)
class RiemannianOptions(Options):
    reg: float = field(default=1e-2, metadata={"help": "lambda: added to the diagonal before the inverse."})
    base: str = field(default="adamw", metadata={"help": 'What takes the new gradient: "adamw" or "sgd".'})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("reg", is_number(self.reg) and self.reg >= 0, "a number >= 0")
        self.require("base", self.base in ("adamw", "sgd"), '"adamw" or "sgd"')


def precondition(batch: Batch, reg: float) -> tuple[Tensor, Tensor]:
    """(BᵀB + λI)⁻¹ g_A and g_B (AAᵀ + λI)⁻¹."""
    assert batch.grad_down is not None
    over_up, over_down = (damped_inverse(t, reg).to(t.dtype) for t in (batch.seen_up.mT, batch.seen_down))
    return over_up @ batch.grad_down, batch.grad_up @ over_down


def damped_inverse(rows: Tensor, reg: float) -> Tensor:
    """(rows·rowsᵀ + λI)⁻¹, L × r × r; the pseudo-inverse for λ = 0."""
    s, rounding = gram(rows)
    if reg == 0:
        return inverse(s, rounding, 0.0)
    return torch.linalg.inv_ex(s + reg * torch.eye(s.shape[1], dtype=s.dtype, device=s.device)).inverse


class Riemannian(PairOptimizer):
    """AdamW or SGD on Riemannian-preconditioned gradients (arXiv 2402.02347)."""

    Options: ClassVar[type[Options]] = RiemannianOptions

    @classmethod
    def remembers(cls, out: int, in_: int, r: int, options: Options) -> Shapes:
        assert isinstance(options, RiemannianOptions)
        if options.base == "sgd":
            return {}
        return moments(out, in_, r)

    def rule(self, batches: list[Batch], group: dict[str, Any]) -> None:
        for batch in batches:
            g_down, g_up = precondition(batch, group["reg"])
            if group["base"] == "sgd":
                for p, g in ((batch.down, g_down), (batch.up, g_up)):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(g, alpha=group["lr"])
                continue
            adam_on_both_(batch, g_down, g_up, group)


register(
    OptimizerRow(
        name="riemannian",
        title="Riemannian LoRA",
        paper="2402.02347",
        summary="AdamW or SGD on gradients divided by the other factor's size.",
        cls=Riemannian,
    )
)
