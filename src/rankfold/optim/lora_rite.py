"""LoRA-RITE: a step of W that does not depend on how the update is split into its two factors.

Paper: LoRA-RITE, arXiv 2410.20625 (ICLR 2025). (B, A) and (B·R⁻¹, R·A) are the same adapter, and Adam moves them differently. With
B = U_B·R_B, U_B orthonormal, and everything below for A (B is its mirror image; t−1 is marked '):

    Ā  = g_Aᵀ R_B⁻¹                             the gradient without the size of B: s·Gᵀ·U_B
    P  = U_Bᵀ U_B'                              how the basis turned
    V  = β₂ P V' Pᵀ + (1−β₂) ĀᵀĀ / in           second moment, r×r
    ρ  = β₂ (ρ' + d)                            mass that the turning lost: no step grows because a basis forgets
    M  = β₁ M' Pᵀ + (1−β₁) Ā (V + ρI)^(−1/2)
    A ← A − η R_B⁻¹ Mᵀ                          so W changes by −η·s·U_B·Mᵀ

β₁ and β₂ are Adam's bias-corrected decays, β(1−βᵗ⁻¹)/(1−βᵗ). From the authors' PyTorch code: both moments as EMAs, the factor 1/in, ε
added to the root, d = min(largest gap of sorted eigenvalues, loss of trace), clip, skip, cap, balance.
Ours: the basis is the polar one, from the r×r Gram matrix in float64 (any basis gives the same W); eigenvalues are clamped at 0
(the code's NaN guard drops whole updates); ρ is on, as in the paper's algorithm, and skipping off (in the code it is the other way
round; its skip at RMS 1 stops training silently where a loss is not averaged).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankfold.optim.options import Options, is_number
from rankfold.optim.pair_optimizer import PairOptimizer
from rankfold.optim.registry import OptimizerRow, register
from rankfold.optim.small import function, inverse_root, precise_gram, widest
from rankfold.optim.stacks import Batch, Shapes


@dataclass(frozen=True)
class LoraRiteOptions(Options):
    eps: float = field(default=1e-6, metadata={"help": "Added to the root of the second moment."})
    escape: bool = field(default=True, metadata={"help": "Keep the mass that a turning basis loses (the paper's rho)."})
    clip: float = field(
        default=1.0, metadata={"help": "Limit of the norm of all unmagnified gradients together; 0: none."}
    )
    skip: float = field(
        default=0.0, metadata={"help": "Drop a factor's gradient whose RMS, unmagnified, exceeds this; 0: never."}
    )
    cap: float = field(
        default=0.0, metadata={"help": "Limit of the RMS of one factor's update before magnifying; 0: none."}
    )
    balance: bool = field(default=False, metadata={"help": "Give both factors the same norm after every step."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("escape", "balance"):
            self.require(name, isinstance(getattr(self, name), bool), "true or false")
        for name in ("clip", "skip", "cap"):
            self.require(name, is_number(getattr(self, name)) and getattr(self, name) >= 0, "a number >= 0")

    @property
    def takes_clipping(self) -> bool:
        return False  # the raw norm depends on the factorisation; `clip` is the norm that does not


@dataclass
class Side:
    """One factor's part of a step. Its rows of length r lie as columns: everything is r × n.

    Args:
        name: "down" or "up", the factor that is trained.
        other: the other factor as seen, L × k × r.
        over_other: R⁻¹ of it, L × r × r, symmetric.
        gradient: Āᵀ or B̄ᵀ, L × r × n.
    """

    name: str
    other: Tensor
    over_other: Tensor
    gradient: Tensor

    def __post_init__(self) -> None:
        self.square = self.gradient @ self.gradient.mT  # ĀᵀĀ
        #: What clipping and skipping multiply the gradient by.
        self.gain = torch.ones_like(self.square[:, :1, :1])

    def norm_square(self) -> Tensor:
        """‖Ā‖², L × 1 × 1."""
        return self.square.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] * self.gain.square()


def sides(batch: Batch) -> tuple[Side, Side]:
    """Both factors with their unmagnified gradients."""
    assert batch.grad_down is not None
    up, down, work = batch.seen_up, batch.seen_down, batch.up.dtype
    over_up = inverse_root(*precise_gram(up.mT)).to(work)
    over_down = inverse_root(*precise_gram(down)).to(work)
    return (
        Side("down", up, over_up, over_up @ batch.grad_down),
        Side("up", down.mT, over_down, (batch.grad_up @ over_down).mT),
    )


def limit(found: list[Side], skip: float, clip: float) -> None:
    """Drops gradients that are too large, then scales all of them by one factor."""
    if skip:
        for side in found:
            rms = (side.norm_square() / side.gradient[0].numel()).sqrt()
            side.gain = torch.where(rms > skip, 0, side.gain)
    if clip:
        squares = [side.norm_square().sum() for side in found]
        norm = torch.stack([s.to(squares[0]) for s in squares]).sum().sqrt()
        shrink = torch.where(norm > clip, clip / norm, 1)
        for side in found:
            side.gain = side.gain * shrink.to(side.gain)


def decay(beta: float, step: int) -> float:
    """β(1−βᵗ⁻¹)/(1−βᵗ): 0 at t = 1, and then no further bias correction is due."""
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)


def advance(side: Side, state: dict[str, Tensor], step: int, group: dict[str, Any]) -> Tensor:
    """Moves the moments of one factor, in place, and returns what magnifies the first one into its update: R⁻¹, capped."""
    b1, b2 = (decay(b, step) for b in group["betas"])
    basis, v, m = state[f"basis_{side.name}"], state[f"second_{side.name}"], state[f"first_{side.name}"]
    wide, work = widest(v), v.dtype
    turn = side.over_other @ (side.other.mT @ basis)  # P = Uᵀ·U' = R⁻ᵀ·Bᵀ·U'
    torch.bmm(side.other, side.over_other, out=basis)  # U
    before = v.to(wide)
    turned = turn.to(wide) @ before @ turn.to(wide).mT
    shift = torch.zeros_like(turned[:, 0, :1])  # ρ
    if group["escape"]:
        gap = (torch.linalg.eigvalsh(before) - torch.linalg.eigvalsh(turned)).amax(1, keepdim=True)
        trace = (before - turned).diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
        escaped = state[f"escaped_{side.name}"]
        escaped.copy_(b2 * (escaped + torch.minimum(gap, trace).clamp_min(0)))
        shift = escaped.to(wide)
    v.copy_(b2 * turned + (1 - b2) / side.gradient.shape[2] * (side.square * side.gain.square()).to(wide))
    values, vectors = torch.linalg.eigh(v.to(wide))
    whiten = function(1 / ((values.clamp_min(0) + shift).sqrt() + group["eps"]), vectors).to(work)
    torch.baddbmm((b1 * turn) @ m, (1 - b1) * side.gain * whiten, side.gradient, out=m)
    if not group["cap"]:
        return side.over_other
    rms = m.square().mean((1, 2), keepdim=True).sqrt()
    return side.over_other / (rms / group["cap"]).clamp_min(1)


def balance_(down: Tensor, up: Tensor) -> None:
    """Gives both factors of each pair the same norm; their product stays."""
    l, q = (t.square().sum((1, 2), keepdim=True).sqrt() + 1e-6 for t in (down, up))
    c = (l * q).sqrt()
    down.mul_(c / l)
    up.mul_(c / q)


class LoraRite(PairOptimizer):
    """Transformation-invariant adaptive steps (arXiv 2410.20625)."""

    Options: ClassVar[type[Options]] = LoraRiteOptions

    @classmethod
    def remembers(cls, out: int, in_: int, r: int, options: Options) -> Shapes:
        assert isinstance(options, LoraRiteOptions)
        kept: Shapes = {}
        for name, rows, other in (("down", in_, out), ("up", out, in_)):
            first = (r, rows)
            kept |= {f"first_{name}": first, f"second_{name}": (r, r), f"basis_{name}": (other, r)}
            if options.escape:
                kept[f"escaped_{name}"] = (1,)
        return kept

    def rule(self, batches: list[Batch], group: dict[str, Any]) -> None:
        found = [(batch, sides(batch)) for batch in batches]
        limit([side for _, both in found for side in both], group["skip"], group["clip"])
        for batch, both in found:
            magnify_down, magnify_up = (advance(side, batch.state, batch.step, group) for side in both)
            lr, kept = group["lr"], 1 - group["lr"] * group["weight_decay"]
            batch.down.baddbmm_(magnify_down, batch.state["first_down"], beta=kept, alpha=-lr)
            batch.up.baddbmm_(batch.state["first_up"].mT, magnify_up, beta=kept, alpha=-lr)
            if group["balance"]:
                balance_(batch.down, batch.up)


register(
    OptimizerRow(
        name="lora_rite",
        title="LoRA-RITE",
        paper="2410.20625",
        summary="Adaptive steps that do not depend on how the update is factored.",
        cls=LoraRite,
    )
)
