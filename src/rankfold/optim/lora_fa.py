"""LoRA-FA: A stays frozen at its random start; B is trained with the gradient that makes s·h_B·A the full gradient's projection.

Paper: LoRA-FA, arXiv 2308.03303.

    h_B = (1/s²) g_B (AAᵀ + δI)⁺ ,    so that s·h_B·A = G·P_A         then AdamW on h_B

From PEFT's code (0.21, peft.optimizers.lorafa): δ = 1e-8; the AdamW of old transformers, whose eps is not bias-corrected
(denominator √v + eps, step lr·√(1−β₂ᵗ)/(1−β₁ᵗ)), eps = 1e-6, weight decay after the step.
Ours: the product is never in bf16; the inverse of the frozen AAᵀ is computed once; s is each layer's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from rankfold.errors import RankfoldError
from rankfold.optim.adam import adam_
from rankfold.optim.options import Options
from rankfold.optim.pair_optimizer import PairOptimizer
from rankfold.optim.pairs import Pair, Split
from rankfold.optim.registry import OptimizerRow, register
from rankfold.optim.small import inverse, precise_gram
from rankfold.optim.stacks import Batch, Shapes

DELTA = 1e-8


@dataclass(frozen=True)
class LoraFaOptions(Options):
    eps: float = field(default=1e-6, metadata={"help": "Added to the root of the second moment."})
    correct_bias: bool = field(default=True, metadata={"help": "Correct the moments' start at zero, as Adam does."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("correct_bias", isinstance(self.correct_bias, bool), "true or false")


class LoraFa(PairOptimizer):
    """AdamW on B alone, with the corrected gradient (arXiv 2308.03303). Freezes every `down` of its pairs when it is made."""

    Options: ClassVar[type[Options]] = LoraFaOptions
    trains_down = False

    @classmethod
    def split(cls, model: nn.Module | Sequence[Pair]) -> Split:
        parts = super().split(model)
        dead = next((p for p in parts.pairs if p.embedding and not p.down.is_meta and not p.down.any()), None)
        if dead is not None:
            raise RankfoldError(
                f"LoraFa: {dead.name}: a new adapter of an embedding starts with down = 0, and with a frozen down it would learn "
                "nothing; leave it out of target_modules, or take LoraPlus or AdamW"
            )
        return parts

    @classmethod
    def remembers(cls, out: int, in_: int, r: int, options: Options) -> Shapes:
        return {"exp_avg": (out, r), "exp_avg_sq": (out, r)}

    def rule(self, batches: list[Batch], group: dict[str, Any]) -> None:
        lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
        for batch in batches:
            h_up = batch.grad_up @ (self._over_down(batch) / batch.scale.square())
            c1, c2 = (1 - beta1**batch.step, 1 - beta2**batch.step)
            # torch divides √v by √c2 and m by c1; both old eps and no correction are a matter of lr and eps
            eps, rate = group["eps"] / math.sqrt(c2), lr if group["correct_bias"] else lr * c1 / math.sqrt(c2)
            kept = batch.state
            adam_([batch.up], [h_up], [kept["exp_avg"]], [kept["exp_avg_sq"]], batch.step, lr=rate, betas=(beta1, beta2), eps=eps)  # fmt: skip
            if decay:
                batch.up.mul_(1 - lr * decay)

    def _over_down(self, batch: Batch) -> Tensor:
        """(AAᵀ + δI)⁺, L × r × r, computed again only where an A was written to."""
        cache: dict[tuple, Tensor] = self.__dict__.setdefault("_inverses", {})
        key = tuple((p.down.data_ptr(), p.down._version) for p in batch.pairs)
        gated = batch.pairs[0].gate is not None
        if gated or key not in cache:
            found = inverse(*precise_gram(batch.seen_down), DELTA).to(batch.up.dtype)
            if gated:
                return found
            ours = {ptr for ptr, _ in key}
            cache = {k: v for k, v in cache.items() if not ours & {ptr for ptr, _ in k}} | {key: found}
            self._inverses = cache
        return cache[key]


register(
    OptimizerRow(
        name="lora_fa",
        title="LoRA-FA",
        paper="2308.03303",
        summary="Freezes A; trains B with the projected full gradient.",
        cls=LoraFa,
    )
)
