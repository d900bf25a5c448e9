"""SoRA: a gate between down- and up-projection, trained with a proximal L1 step, so that ranks switch off exactly.

Paper: Sparse Low-rank Adaptation, arXiv 2311.11696 (EMNLP 2023); its body could not be read. From the authors' code: the
gate's first values N(0, 1), A Kaiming, B = 0, scale always α/r_max, a second AdamW for the gates (no weight decay, ε 1e-6,
stepped after the first), a constant threshold ξ that the learning rate does not multiply.

`preset="paper"` (default): soft threshold (OUR INTERPRETATION of the abstract's proximal gradient), no L1 in the loss.
`preset="reference"`: the released code, whose operator has a dead zone of 2ξ and which adds λ₁·mean|g| to the loss and clips at
0.1, as its STS-B script does. The main optimiser's settings there (AdamW, weight decay 0.1, lr 8e-4, linear with 6 % warm-up,
trainer's own clipping off) belong to the run file.
Ours: the L1 term's gradient is added after the loop's own clipping; `clip` then clips the whole, once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from rankfold.control.controller import Controller, finite
from rankfold.errors import RankfoldError
from rankfold.host.adapter import first_pair_
from rankfold.host.config import LowRankConfig
from rankfold.host.registry import Method, register
from rankfold.methods.gated import Gated, on_one_device

PRESETS = {
    "paper": {"prox": "soft", "l1": 0.0, "clip": None},
    "reference": {"prox": "reference", "l1": 10.0, "clip": 0.1},  # the STS-B script
}


@dataclass
class SoraConfig(LowRankConfig):
    """SoRA (arXiv 2311.11696).

    Args:
        threshold: ξ, how far every gate shrinks per optimiser step. Its effect grows with the number of steps: a gate
            that the task does not hold up dies after |g|/ξ of them.
        preset: "paper" or "reference"; gives `prox`, `l1` and `clip` where they are None.
        prox: "soft", or "reference" for the released code's operator.
        l1: λ₁, weight of the mean of |g| over the model in the loss.
        clip: the largest norm of all gradients together, L1 term included; None leaves clipping to the loop.
        threshold_times_lr: multiply ξ by the current learning rate (an unused file of the authors does).
        gate_lr: the gates' learning rate; None: that of the optimiser's group they are in, schedule included.
    """

    method: ClassVar[str] = "sora"
    sparser_with: ClassVar[str] = "threshold"
    note: ClassVar[str] = "its threshold decides how many ranks are left; counted with all of them"
    threshold: float = field(default=3e-4, metadata={"help": "xi: how far every gate shrinks per optimiser step."})
    preset: str = field(default="paper", metadata={"help": '"paper", or "reference" for the released code.'})
    prox: str | None = field(default=None, metadata={"help": '"soft" or "reference"; default by preset.'})
    l1: float | None = field(default=None, metadata={"help": "Weight of mean |gate| in the loss; default by preset."})
    clip: float | None = field(default=None, metadata={"help": "Gradient norm limit, L1 included; default by preset."})
    threshold_times_lr: bool = field(default=False, metadata={"help": "Multiply the threshold by the learning rate."})
    gate_lr: float | None = field(default=None, metadata={"help": "Learning rate of the gates; default: the others'."})

    def __post_init__(self) -> None:
        for name, value in PRESETS.get(self.preset, {}).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()

    def check(self) -> None:
        super().check()
        self.require("preset", self.preset, self.preset in PRESETS, " or ".join(f'"{p}"' for p in PRESETS))
        self.require("prox", self.prox, self.prox in ("soft", "reference"), '"soft" or "reference"')
        self.require("threshold", self.threshold, self.threshold >= 0, "a number >= 0")
        self.require("l1", self.l1, self.l1 is not None and self.l1 >= 0, "a number >= 0")
        self.require("clip", self.clip, self.clip is None or self.clip > 0, "a number > 0, or null")
        self.require("gate_lr", self.gate_lr, self.gate_lr is None or self.gate_lr > 0, "a number > 0, or null")


class Sora(Gated):
    def first_values(self) -> None:
        first_pair_(self.down, self.up, self.site)
        nn.init.normal_(self.gate)  # g ~ N(0, 1)


def soft_threshold(v: Tensor, xi: float) -> Tensor:
    """T_ξ(v) = sign(v)·max(|v| − ξ, 0), the minimiser of ½(u − v)² + ξ|u|."""
    return v.sign() * (v.abs() - xi).clamp_min(0.0)


def reference_threshold(v: Tensor, xi: float) -> Tensor:
    """The released code's operator: 0 below 2ξ, soft above, and |v| = ξ left as it is (its third statement tests values
    that the first two have shrunk already)."""
    shrunk = v.sign() * (v.abs() - xi)
    return torch.where(v.abs() == xi, v, torch.where(v.abs() < 2 * xi, torch.zeros_like(v), shrunk))


class SoraController(Controller[Sora, SoraConfig]):
    """Owns the gates' optimiser: the user's skips them, and with them its weight decay."""

    BETAS, EPS = (0.9, 0.999), 1e-6

    def __init__(self, config: SoraConfig, adapters: Sequence[Sora], total_steps: int | None) -> None:
        super().__init__(config, adapters, total_steps)
        self.state |= {
            "m": [torch.zeros_like(a.gate) for a in self.adapters],
            "v": [torch.zeros_like(a.gate) for a in self.adapters],
            "gradients": [0 for _ in self.adapters],  # how many each gate has had: Adam's own count of steps
        }
        self._grads: list[Tensor | None] = []
        self._rates: list[float] = []
        self._all_dead = False

    def extra_loss(self) -> Tensor | None:
        if not self.config.l1:
            return None
        gates = on_one_device([a.gate for a in self.adapters])
        return self.config.l1 * gates.abs().mean()  # λ₁ · Σ|g| / number of gates in the model

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.config.clip is not None:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(params, self.config.clip)
        self._rates = [self._rate(a, optimizer) for a in self.adapters]
        self._grads = [a.gate.grad for a in self.adapters]
        for adapter, grad in zip(self.adapters, self._grads, strict=True):
            if grad is not None:  # now, while the weights are still good
                finite(f"SoRA: the gate's gradient at {adapter.site.name}", grad)
        for adapter in self.adapters:
            adapter.gate.grad = None  # a parameter without a gradient is left alone by every torch optimiser

    def _rate(self, adapter: Sora, optimizer: torch.optim.Optimizer) -> float:
        """The learning rate of an adapter's gate; asked before anything moves."""
        if self.config.gate_lr is not None:
            return self.config.gate_lr
        lr = next((g["lr"] for g in optimizer.param_groups for p in g["params"] if p is adapter.gate), 0.0)
        if lr is None:  # Adafactor chooses its own
            raise RankfoldError(
                f"SoRA: the gate at {adapter.site.name} has no learning rate, because the optimiser's lr is None; set gate_lr in "
                "the config"
            )
        return float(lr)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        (b1, b2), counts = self.BETAS, self.state["gradients"]
        prox = soft_threshold if self.config.prox == "soft" else reference_threshold
        rows = zip(self.adapters, self._grads, self._rates, self.state["m"], self.state["v"], strict=True)
        for i, (adapter, grad, lr, m, v) in enumerate(rows):
            gate = adapter.gate
            if not gate.requires_grad:  # frozen by the user: a plain LoRA with a constant gate
                continue
            xi = self.config.threshold * (lr if self.config.threshold_times_lr else 1.0)
            if grad is not None:
                counts[i] += 1
                size = lr * math.sqrt(1 - b2 ** counts[i]) / (1 - b1 ** counts[i])
                grad = grad.to(m.dtype)
                m.mul_(b1).add_(grad, alpha=1 - b1)
                v.mul_(b2).addcmul_(grad, grad, value=1 - b2)
                gate.addcdiv_(m, v.sqrt().add_(self.EPS), value=-size)
            if xi > 0:
                gate.copy_(prox(gate, xi))
            gate.grad = grad
        if not self._all_dead and not any(a.alive() for a in self.adapters):
            self._all_dead = True
            warnings.warn(
                f"SoRA: every gate is zero after step {self.step}, so the adapter does nothing; threshold={self.config.threshold} is "
                f"too high for this many steps (each one shrinks every gate by it)",
                stacklevel=2,
            )


SORA = register(
    Method(
        name="sora",
        title="SoRA",
        paper="2311.11696",
        summary="A gated LoRA whose gates a proximal step switches off; the folded rank is what is left.",
        config=SoraConfig,
        adapter=Sora,
        controller=SoraController,
        folds_at="gates left, per layer",
        example={"threshold": 1e-3},
    )
)
