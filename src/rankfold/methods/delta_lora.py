"""Delta-LoRA: from step K on, W follows the product B·A: each step adds λ times its change to W, without a gradient for W.

Paper: arXiv 2309.02411; its algorithm, λ = 2 and K = 500 are quoted in third-party code. In 0-based steps t:

    if t > K:  W^{t+1} = W^t + λ·s·(B^{t+1}A^{t+1} − B^tA^t)

Ours: the sum telescopes. With the factors after κ = K + 1 steps as a snapshot, W^T + s·B^TA^T is

    W_0 + (1 + λ)·s·B^TA^T − λ·s·B^κA^κ

of rank 2r at most, so W_0 is not written and nothing drifts; the second λ is a constant for the gradient, as in the paper.
`literal=True` adds up the increments themselves, in a dense float32 matrix beside each W. Dropout is refused, as in the
paper: with it, the gradients of W and of B·A are not parallel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankfold.control.controller import Controller
from rankfold.control.sharded import whole
from rankfold.errors import RankfoldError
from rankfold.host.adapter import Site
from rankfold.host.config import LowRankConfig
from rankfold.host.registry import Method, register
from rankfold.kernel.factors import Factors
from rankfold.methods.chain import Chain


@dataclass
class DeltaLoraConfig(LowRankConfig):
    """Delta-LoRA (arXiv 2309.02411).

    Args:
        delta_weight: λ ≥ 0.
        start_step: K ≥ 0; the first step that changes W is K + 1, counted from 0.
        literal: add up the paper's increments in float32, out × in per module, instead of the closed form.
    """

    method: ClassVar[str] = "delta_lora"
    delta_weight: float = field(default=2.0, metadata={"help": "lambda: weight of the product's change in W."})
    start_step: int = field(default=500, metadata={"help": "K: W follows from the step after this one on, from 0."})
    literal: bool = field(
        default=False, metadata={"help": "Add up the increments, a dense float32 matrix per module; for reference."}
    )

    @classmethod
    def planned(cls, **fields: Any) -> DeltaLoraConfig:
        """Counts the snapshot."""
        config = cls(**fields)
        vars(config)["planned_links"] = int(not config.literal)
        return config

    def check(self) -> None:
        super().check()
        self.require("lora_dropout", self.lora_dropout, not self.lora_dropout, "0: Delta-LoRA's update of W needs it")
        self.require("delta_weight", self.delta_weight, self.delta_weight >= 0, "a number >= 0")
        self.require("start_step", self.start_step, self.start_step >= 0, "an integer >= 0")


class DeltaLora(Chain):
    """`links_down` and `links_up` are the snapshot, B^κ and A^κ."""

    config: DeltaLoraConfig
    written: Tensor

    def __init__(self, config: DeltaLoraConfig, site: Site, shared: nn.Module | None = None) -> None:
        super().__init__(config, site, shared)
        if config.literal:
            self.register_buffer("written", torch.zeros(site.out_features, site.in_features))  # W^t − W_0

    def links(self) -> Sequence[Factors]:
        weight = self.config.delta_weight
        if self.config.literal:
            return (_dense(self.written),)
        return tuple(snapshot.scaled(-weight) for snapshot in super().links() if weight)

    def blocks(self) -> Sequence[Factors]:
        live, links = self.live(), self.links()
        if self.config.literal or not links:
            return (live, *links)
        return (live, live.detach().scaled(self.config.delta_weight), *links)

    def factors(self) -> Factors:
        """The live pair and its constant copy are one pair."""
        live, *others = self.blocks()
        if not self.config.literal and others:
            live, others = live.scaled(1 + self.config.delta_weight), self.links()
        return live.concat(*others).scaled(self.multiplier)

    def alive(self) -> int:
        return self.factors().rank


def _dense(matrix: Tensor) -> Factors:
    """A matrix, out × in, as the product of itself and an identity."""
    out, in_features = matrix.shape
    eye = torch.eye(min(out, in_features), dtype=matrix.dtype, device=matrix.device)
    every = torch.arange(len(eye), device=matrix.device)
    return Factors(eye, matrix, down_index=every) if in_features <= out else Factors(matrix, eye, up_index=every)


class DeltaLoraController(Controller[DeltaLora, DeltaLoraConfig]):
    def __init__(self, config: DeltaLoraConfig, adapters: Sequence[DeltaLora], total_steps: int | None) -> None:
        super().__init__(config, adapters, total_steps)
        if total_steps and config.start_step + 2 > total_steps:
            raise RankfoldError(
                f"DeltaLoraConfig: start_step={config.start_step} leaves no step that changes W in a run of {total_steps}; choose "
                f"start_step <= {total_steps - 2}, or train longer"
            )
        for a in self.adapters:
            a.drop_empty_links()
            if config.literal and a.written.dtype.itemsize < 4:
                raise RankfoldError(
                    f"DeltaLoraConfig: literal=True adds up small increments, which {a.written.dtype} would lose at {a.site.name}; leave "
                    "autocast_adapter_dtype=True, or choose literal=False"
                )
        self._before: list[tuple[Tensor, Tensor]] = []

    def follows(self) -> bool:
        """Whether the step that is counted already changes W."""
        return self.step > self.config.start_step + 1

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.config.literal:
            self._before = [(whole(a.down).detach().clone(), whole(a.up).detach().clone()) for a in self.adapters]

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        c = self.config
        if c.literal and self.follows():
            for a, (down, up) in zip(self.adapters, self._before, strict=True):
                # B^{t+1}A^{t+1} − B^tA^t, and not the product of the differences
                change = Factors(whole(a.down), whole(a.up)).minus(Factors(down, up))
                a.written += c.delta_weight * a.scaling * change.delta()
        elif not c.literal and self.step == c.start_step + 1:
            for a in self.adapters:
                if not a.frozen_rank:  # or W has followed since an earlier run
                    a.add_link(a.finished(0))

    def progress(self) -> dict[str, Any]:
        return super().progress() | {"follows": self.follows()}

    def finished(self) -> bool:
        return self.follows()


DELTA_LORA = register(
    Method(
        name="delta_lora",
        title="Delta-LoRA",
        paper="2309.02411",
        summary="After a warm-up, W follows the product of the factors; one snapshot of them says by how much.",
        config=DeltaLoraConfig,
        adapter=DeltaLora,
        controller=DeltaLoraController,
        folds_at="2r",
        example={"start_step": 50},
    )
)
