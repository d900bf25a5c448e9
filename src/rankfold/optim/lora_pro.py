"""LoRA-Pro: the pair moves so that W moves as close to its full gradient as the pair can.

Paper: LoRA-Pro, arXiv 2407.18242 (ICLR 2025). The step (h_A, h_B) minimises ‖s·B·h_A + s·h_B·A − G‖_F. For any r×r matrix X:

    h_A = (1/s²) (BᵀB)⁻¹ g_A + X·A
    h_B = (1/s²) (I − B(BᵀB)⁻¹Bᵀ) g_B (AAᵀ)⁻¹ − B·X
    g~  = s·B·h_A + s·h_B·A  =  G − (I − P_B)·G·(I − P_A)             the same for every X

Modes: "sgd"; "full", whose Adam moments are of the full g~ (state 2·out·in per pair); "efficient", Adam on (h_A, h_B).
From the authors' code: δ = 1e-8 inside the inverses, X by a Sylvester equation (nearest to the plain LoRA gradients), the three modes.
Ours: the correct "symmetry" X (the code multiplies where it should divide); steps count from 1 (the code's first update is 0.744
of Adam's); B = 0 is seen from B and not from the step number; decay in "full" mode acts on the pair's product alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankfold.optim.adam import adam_, adam_on_both_, moments
from rankfold.optim.options import Options
from rankfold.optim.pair_optimizer import PairOptimizer
from rankfold.optim.registry import OptimizerRow, register
from rankfold.optim.small import eigh, function, gram, sylvester
from rankfold.optim.stacks import Batch, Shapes

DELTA = 1e-8
#: Elements of an out×in stack that "full" mode makes at once: few enough for a CPU's cache, many enough for an accelerator.
CHUNK_CPU, CHUNK = 2**20, 2**24


@dataclass(frozen=True)
class LoraProOptions(Options):
    mode: str = field(default="full", metadata={"help": '"full" (state 2·out·in per pair), "efficient" (LoRA\'s state), or "sgd".'})  # fmt: skip
    x_mode: str = field(
        default="sylvester", metadata={"help": 'Which of the equal steps: "sylvester", "symmetry" or "zero".'}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("mode", self.mode in ("full", "efficient", "sgd"), '"full", "efficient" or "sgd"')
        self.require("x_mode", self.x_mode in ("sylvester", "symmetry", "zero"), '"sylvester", "symmetry" or "zero"')
        ok = self.mode != "sgd" or self.weight_decay == 0
        self.require("weight_decay", ok, '0 in mode="sgd", whose rule has none; take mode="efficient" for decay')

    @property
    def takes_clipping(self) -> bool:
        return self.mode == "sgd"  # the others divide by the size of what they see, as Adam does


@dataclass(frozen=True)
class Sizes:
    """What the step needs of the factors alone. r×r, in the widest type.

    Args:
        up, down: eigenvalues and eigenvectors of BᵀB and AAᵀ.
        over_up, over_down: (BᵀB + δI)⁺ and (AAᵀ + δI)⁺; zero where the factor is.
    """

    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    over_up: Tensor
    over_down: Tensor

    @classmethod
    def of(cls, up: Tensor, down: Tensor) -> Sizes:
        (p, u, real_p), (q, v, real_q) = eigh(*gram(up.mT)), eigh(*gram(down))
        over_up = function(torch.where(real_p, 1 / (p + DELTA), 0), u)
        return cls((p, u), (q, v), over_up, function(torch.where(real_q, 1 / (q + DELTA), 0), v))


def project(
    up: Tensor, down: Tensor, g_up: Tensor, g_down: Tensor, scale: Tensor, sizes: Sizes, x_mode: str
) -> tuple[Tensor, Tensor]:
    """(h_B, h_A): the step whose change of W is nearest to the full gradient, of which g_B and g_A are the factors' shares.

    Args:
        up, g_up: L × out × r; down, g_down: L × r × in.
        scale: L × 1 × 1.
        x_mode: which X.
    """
    work, wide = up.dtype, sizes.over_up.dtype
    over_square = 1 / scale.to(wide).square()
    over_up, over_down = sizes.over_up * over_square, sizes.over_down * over_square
    common = (up.mT @ g_up).to(wide)  # Bᵀ·g_B = g_A·Aᵀ = s·Bᵀ·G·Aᵀ
    along_up = sizes.over_up @ common @ over_down  # (BᵀB)⁻¹Bᵀ · g_B (AAᵀ)⁻¹/s²
    h_down = over_up.to(work) @ g_down
    if x_mode != "zero":
        c = -over_up @ common
        x = sylvester(sizes.up, sizes.down, c) if x_mode == "sylvester" else 0.5 * c @ sizes.over_down
        h_down.baddbmm_(x.to(work), down)
        along_up = along_up + x
    h_up = g_up @ over_down.to(work)
    return h_up.baddbmm_(up, along_up.to(work), alpha=-1), h_down


def full_direction(batch: Batch, h_up: Tensor, h_down: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Adam on g~ = s·B·h_A + s·h_B·A, and its direction U as if it were the full gradient: (s·U·Aᵀ, s·Bᵀ·U)."""
    left = torch.cat([batch.seen_up, h_up], 2) * batch.scale
    right = torch.cat([h_down, batch.seen_down], 1)
    g_up, g_down = torch.empty_like(h_up), torch.empty_like(h_down)
    out, in_ = left.shape[1], right.shape[2]
    several = max((CHUNK_CPU if left.device.type == "cpu" else CHUNK) // (out * in_), 1)
    for start in range(0, len(left), several):
        some = slice(start, start + several)
        g = left[some] @ right[some]
        u = torch.zeros_like(g)
        m, v = batch.state["exp_avg"][some], batch.state["exp_avg_sq"][some]
        # Backwards from 0, so that u is Adam's direction itself
        adam_([u], [g], [m], [v], batch.step, lr=-1.0, betas=group["betas"], eps=group["eps"])
        g_up[some] = u @ batch.seen_down[some].mT
        g_down[some] = batch.seen_up[some].mT @ u
    return g_up * batch.scale, g_down * batch.scale


class LoraPro(PairOptimizer):
    """SGD or AdamW on the nearest step to the full gradient (arXiv 2407.18242)."""

    Options: ClassVar[type[Options]] = LoraProOptions

    @classmethod
    def remembers(cls, out: int, in_: int, r: int, options: Options) -> Shapes:
        assert isinstance(options, LoraProOptions)
        if options.mode == "sgd":
            return {}
        if options.mode == "full":
            return {"exp_avg": (out, in_), "exp_avg_sq": (out, in_)}
        return moments(out, in_, r)

    def rule(self, batches: list[Batch], group: dict[str, Any]) -> None:
        lr, mode, x_mode, decay = group["lr"], group["mode"], group["x_mode"], group["weight_decay"]
        for batch in batches:
            assert batch.grad_down is not None
            up, down = batch.seen_up, batch.seen_down
            sizes = Sizes.of(up, down)
            first = "zero" if mode == "full" else x_mode
            h_up, h_down = project(up, down, batch.grad_up, batch.grad_down, batch.scale, sizes, first)
            if mode == "efficient":
                adam_on_both_(batch, h_down, h_up, group)
                continue
            if mode == "full":
                g_up, g_down = full_direction(batch, h_up, h_down, group)
                h_up, h_down = project(up, down, g_up, g_down, batch.scale, sizes, x_mode)
                if decay:  # of the product by 1 − ηλ
                    batch.up.mul_(math.sqrt(max(1 - lr * decay, 0.0)))
                    batch.down.mul_(math.sqrt(max(1 - lr * decay, 0.0)))
            batch.up.sub_(h_up, alpha=lr)
            batch.down.sub_(h_down, alpha=lr)


register(
    OptimizerRow(
        name="lora_pro",
        title="LoRA-Pro",
        paper="2407.18242",
        summary="Moves W as close to its full gradient as the pair can.",
        cls=LoraPro,
    )
)
