"""LoRA+: LoRA's optimiser with a higher learning rate for B than for A, η_B = λ·η_A.

Paper: LoRA+, arXiv 2402.12354 (ICML 2024). λ = 2⁴ = 16 is the paper's advice; more for tasks that are hard for the base model.
From the authors' code and PEFT's: both factors of an adapted embedding have a rate of their own, 1e-6.
Ours: whatever is not a pair (heads with their biases, norms, gates, magnitudes, LoRA biases, shared pools) trains at `lr`; PEFT
gives every vector λ·lr, so that a head's bias learns λ times faster than its weight. Vectors are not decayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from rankfold.optim.adam import moments
from rankfold.optim.options import Options, check_lr, is_number
from rankfold.optim.pair_aware import PairAware
from rankfold.optim.pairs import Pair
from rankfold.optim.registry import OptimizerRow, register
from rankfold.optim.stacks import Shapes


@dataclass(frozen=True)
class LoraPlusOptions(Options):
    ratio: float = field(default=16.0, metadata={"help": "lambda: learning rate of B over that of A."})
    embedding_lr: float | None = field(default=1e-6, metadata={"help": "Learning rate of adapted embeddings; null: as other pairs."})  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("ratio", is_number(self.ratio) and self.ratio > 0, "a number > 0; the method is for >= 1")
        ok = self.embedding_lr is None or (is_number(self.embedding_lr) and self.embedding_lr >= 0)
        self.require("embedding_lr", ok, "a number >= 0, or null for the rates of other pairs")


class LoraPlus(PairAware, torch.optim.AdamW):
    """AdamW on LoRA+'s groups (arXiv 2402.12354). `LoraPlus.groups(model, lr)` makes the groups for any other optimiser.

    Args:
        model: a model with adapters, or pairs of one, and nothing else is trained.
        lr: η_A.
        foreach, fused: as in torch.optim.AdamW.
        options: the fields of `LoraPlusOptions`.

    A scheduler must multiply the groups' rates, as LambdaLR does, and must not set one rate for all of them.

    Raises:
        RankfoldError: a model without pairs, an unknown option or one out of range.
    """

    Options: ClassVar[type[Options]] = LoraPlusOptions
    joint = False

    def __init__(
        self,
        model: nn.Module | Sequence[Pair],
        lr: float = 1e-3,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        **options: Any,
    ) -> None:
        given = LoraPlusOptions.of(options)
        super().__init__(
            self.groups(model, lr, **options), lr=lr, betas=given.betas, eps=given.eps, weight_decay=given.weight_decay,
            foreach=foreach, fused=fused,
        )  # fmt: skip

    @staticmethod
    def groups(model: nn.Module | Sequence[Pair], lr: float, **options: Any) -> list[dict[str, Any]]:
        """The parameter groups: downs at lr, ups at λ·lr, embeddings' pairs, plain matrices, plain vectors (not decayed)."""
        check_lr("LoraPlus", lr)
        given = LoraPlusOptions.of(options)
        parts = LoraPlus.take(model)
        slow = given.embedding_lr is not None
        pairs = [p for p in parts.pairs if not (p.embedding and slow)]
        embeddings = [p for p in parts.pairs if p.embedding and slow]
        plain_lr = lr if given.plain_lr is None else given.plain_lr
        made = [
            ("down", [p.down for p in pairs], lr, given.weight_decay),
            ("up", [p.up for p in pairs], lr * given.ratio, given.weight_decay),
            ("embedding", [f for p in embeddings for f in (p.down, p.up)], given.embedding_lr, given.weight_decay),
            ("plain", [p.parameter for p in parts.plain if p.parameter.ndim >= 2], plain_lr, given.weight_decay),
            ("plain vectors", [p.parameter for p in parts.plain if p.parameter.ndim < 2], plain_lr, 0.0),
        ]
        return [
            {"params": params, "lr": rate, "weight_decay": decay, "kind": kind}
            for kind, params, rate, decay in made
            if params
        ]

    @classmethod
    def remembers(cls, out: int, in_: int, r: int, options: Options) -> Shapes:
        return moments(out, in_, r)


register(
    OptimizerRow(
        name="lora_plus",
        title="LoRA+",
        paper="2402.12354",
        summary="AdamW with a higher learning rate for B than for A.",
        cls=LoraPlus,
    )
)
