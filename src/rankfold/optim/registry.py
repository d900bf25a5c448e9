"""The optimisers by name: one row each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import Field, dataclass, fields
from typing import Any

import torch

from rankfold.errors import RankfoldError
from rankfold.optim.lora_fa import LoraFa
from rankfold.optim.lora_plus import LoraPlus
from rankfold.optim.lora_pro import LoraPro
from rankfold.optim.lora_rite import LoraRite
from rankfold.optim.options import Options
from rankfold.optim.pair_optimizer import PairOptimizer
from rankfold.optim.riemannian import Riemannian


@dataclass(frozen=True)
class OptimizerRow:
    """What is known of an optimiser without making one.

    Args:
        name: what `create` and `optimizer_cls_and_kwargs` call it.
        title: what the paper calls it.
        paper: arXiv id.
        summary: one line.
        cls: the torch optimiser.
        invariant: whether its step of W is the same for (A, B) and (R·A, B·R⁻¹); clipping by the raw norm breaks that.
    """

    name: str
    title: str
    paper: str
    summary: str
    cls: type[LoraPlus] | type[PairOptimizer]
    invariant: bool = False

    def check(self, **options: Any) -> Options:
        """The options, completed; raises RankfoldError for one that does not exist or is out of range."""
        return self.cls.Options.of(options)

    def options(self) -> tuple[Field[Any], ...]:
        """Name, default and `metadata["help"]` of every option."""
        return fields(self.cls.Options)

    def state_bytes(
        self, shapes: Iterable[tuple[int, int, int]], plain: int = 0, itemsize: int = 4, **options: Any
    ) -> int:
        """Bytes of its tensors after the first step (counts of steps left out).

        Args:
            shapes: (out, in, r) of every pair.
            plain: trained parameters that are not a pair's.
            itemsize: bytes of one element of the state.
        """
        given = self.check(**options)
        elements = 2 * plain
        for out, in_, r in shapes:
            if issubclass(self.cls, PairOptimizer):
                elements += sum(_count(shape) for shape in self.cls.remembers(out, in_, r, given).values())
            else:
                elements += 2 * r * (out + in_)
        return elements * itemsize


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


OPTIMIZERS: dict[str, OptimizerRow] = {
    row.name: row
    for row in (
        OptimizerRow("lora_plus", "LoRA+", "2402.12354", "AdamW with a higher learning rate for B than for A.", LoraPlus),
        OptimizerRow(
            "lora_pro", "LoRA-Pro", "2407.18242", "Moves W as close to its full gradient as the pair can.", LoraPro
        ),
        OptimizerRow(
            "lora_rite", "LoRA-RITE", "2410.20625", "Adaptive steps that do not depend on how the update is factored.", LoraRite, True
        ),
        OptimizerRow("lora_fa", "LoRA-FA", "2308.03303", "Freezes A; trains B with the projected full gradient.", LoraFa),
        OptimizerRow(
            "riemannian", "Riemannian LoRA", "2402.02347", "AdamW or SGD on gradients divided by the other factor's size.", Riemannian
        ),
    )
}  # fmt: skip


def get(name: str) -> OptimizerRow:
    """The row called `name`; raises RankfoldError that names the nearest."""
    if name not in OPTIMIZERS:
        near = difflib.get_close_matches(name, OPTIMIZERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "there are " + ", ".join(OPTIMIZERS)
        raise RankfoldError(f"optimizer={name!r} is not known; {hint}")
    return OPTIMIZERS[name]
