"""RAC-LoRA: a chain of which each link draws one factor anew, at random, and trains the other alone.

Paper: Randomized Asymmetric Chain of LoRA, arXiv 2410.08305. With a sketch on the right (A_S drawn, B trained) or on the left:

    right  ΔW ← ΔW + s·B̂·A_S        left  ΔW ← ΔW + s·B_S·Â         Â, B̂ start at 0

From public reviews that restate algorithm and theorems (the body could not be read): Gaussian sketches, drawn anew for every link and
layer; fresh optimiser state; the closed form that `solver="exact_gd"` takes, one step per link,

    right  W⁺ = W − γ·∇f(W)·H_A,  H_A = A_Sᵀ(A_S A_Sᵀ)⁺A_S        left  W⁺ = W − γ·H_B·∇f(W),  H_B = B_S(B_SᵀB_S)⁺B_Sᵀ

with γ the learning rate of the run. Its rates hold for gradient descent, not for AdamW.
NOT FOUND: the sketch's standard deviation, steps per link. OUR INTERPRETATION: N(0, 1/in) on the right, N(0, 1/r) on the left, which
keep A_S·x and B_S·z at the size of their inputs; links of equal length. Ours: links stay factors, and W is not written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from rankfold.control.sharded import fill_, whole
from rankfold.errors import RankfoldError
from rankfold.host.adapter import Site
from rankfold.host.registry import Method, register
from rankfold.methods.chain import Chain
from rankfold.methods.knots import ChainConfig, ChainController


@dataclass
class RacLoraConfig(ChainConfig):
    """RAC-LoRA (arXiv 2410.08305).

    Args:
        side: "right" draws A and trains B, "left" draws B and trains A.
        sketch: "gaussian"; or "orthonormal" rows of A or columns of B, with which plain SGD takes the step of `exact_gd`.
        sketch_std: of a Gaussian sketch, > 0; by default 1/√in on the right and 1/√r on the left.
        solver: "optimizer": the run's; "exact_gd": the theory's closed form, one step per link.
    """

    method: ClassVar[str] = "rac_lora"
    default_length: ClassVar[dict[str, int]] = {"links": 10}
    side: Literal["right", "left"] = field(
        default="right", metadata={"help": '"right" draws A and trains B; "left" draws B and trains A.'}
    )
    sketch: Literal["gaussian", "orthonormal"] = field(default="gaussian", metadata={"help": "How it is drawn."})
    sketch_std: float | None = field(
        default=None, metadata={"help": "Of a Gaussian sketch; default 1/sqrt(in) on the right, 1/sqrt(r) on the left."}
    )
    solver: Literal["optimizer", "exact_gd"] = field(
        default="optimizer", metadata={"help": '"exact_gd": the closed form of the theory, one step per link.'}
    )

    def __post_init__(self) -> None:
        if self.solver == "exact_gd" and self.links is None and self.link_shares is None and self.link_steps is None:
            self.link_steps = 1
        super().__post_init__()

    def check(self) -> None:
        super().check()
        std = self.sketch_std
        self.require("sketch_std", std, std is None or std > 0, "a number > 0, or null")
        exact = self.solver == "exact_gd"
        self.require("link_steps", self.link_steps, not exact or self.link_steps == 1, '1 where solver is "exact_gd"')
        self.require(
            "lora_dropout", self.lora_dropout, not (exact and self.lora_dropout), '0 where solver is "exact_gd"'
        )


class RacLora(Chain):
    config: RacLoraConfig

    def __init__(self, config: RacLoraConfig, site: Site, shared: nn.Module | None = None) -> None:
        super().__init__(config, site, shared)
        self.drawn = "down" if config.side == "right" else "up"
        values = getattr(self, self.drawn).detach()
        delattr(self, self.drawn)
        self.register_buffer(self.drawn, values)

    @classmethod
    def check_site(cls, config: RacLoraConfig, site: Site) -> None:
        r, d = config.rank_at(site.name), site.in_features if config.side == "right" else site.out_features
        if config.sketch == "orthonormal" and r > d:
            raise RankfoldError(
                f"RacLoraConfig: sketch='orthonormal' finds no {r} orthonormal vectors of {d} entries at {site.name}; choose r <= {d} "
                "or sketch='gaussian'"
            )

    def sketch(self, generator: torch.Generator | None) -> Tensor:
        """r × d, the factor that is not trained, or its transpose; d = in on the right, out on the left."""
        right = self.drawn == "down"
        d = self.site.in_features if right else self.site.out_features
        std = self.config.sketch_std or 1 / math.sqrt(d if right else self.r)
        drawn = nn.init.normal_(torch.empty(self.r, d, device="cpu"), std=std, generator=generator)
        return torch.linalg.qr(drawn.T).Q.T if self.config.sketch == "orthonormal" else drawn

    def fresh(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        sketch, site = self.sketch(generator), self.site
        if self.drawn == "down":
            return sketch, torch.zeros(site.out_features, self.r, device="cpu")
        return torch.zeros(self.r, site.in_features, device="cpu"), sketch.T

    @property
    def trained(self) -> nn.Parameter:
        return self.up if self.drawn == "down" else self.down

    def exact_step(self, grad: Tensor) -> Tensor:
        """What is added to the trained factor, which is 0, per unit of γ; `grad` is its gradient, whole."""
        s = self.scaling
        wide = torch.promote_types(grad.dtype, torch.float32)
        sketch = whole(getattr(self, self.drawn)).to(wide)
        if self.drawn == "down":
            return -(grad.to(wide) @ torch.linalg.pinv(sketch @ sketch.T, hermitian=True)) / s**2
        return -(torch.linalg.pinv(sketch.T @ sketch, hermitian=True) @ grad.to(wide)) / s**2


class RacLoraController(ChainController[RacLora, RacLoraConfig]):
    def __init__(self, config: RacLoraConfig, adapters: Sequence[RacLora], total_steps: int | None) -> None:
        super().__init__(config, adapters, total_steps)
        self._grads: list[Tensor | None] = []

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().before_step(optimizer)
        if self.config.solver == "exact_gd":
            self._grads = [a.trained.grad for a in self.adapters]
            for a in self.adapters:
                a.trained.grad = None  # a parameter without a gradient is left alone by every torch optimiser

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.config.solver == "exact_gd":
            rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
            for a, grad in zip(self.adapters, self._grads, strict=True):
                a.trained.grad = grad
                if grad is not None:
                    fill_(a.trained, whole(a.trained) + rates[id(a.trained)] * a.exact_step(whole(grad)))
        super().after_step(optimizer)


RAC_LORA = register(
    Method(
        name="rac_lora",
        title="RAC-LoRA",
        paper="2410.08305",
        summary="A chain whose links each draw one factor at random, freeze it, and train the other.",
        config=RacLoraConfig,
        adapter=RacLora,
        controller=RacLoraController,
        folds_at="sum of the links' ranks",
        example={"links": 2},
    )
)
