"""A plain LoRA near an adapter whose update depends on the input, and how near: `fold --approximate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import RankfoldError
from rankfold.host import registry
from rankfold.host.config import LowRankConfig
from rankfold.host.layer import AdaptedLayer


@dataclass(frozen=True)
class Approximation:
    """What a fold was approximated by.

    Args:
        rule: of the method's.
        change_error: ‖y' − y‖_F / ‖y − y_base‖_F over all outputs y, relative to what the adapter changes; None where not measured.
        output_error: the same relative to ‖y‖_F.
        batches: how many it was measured on.
    """

    rule: str
    change_error: float | None = None
    output_error: float | None = None
    batches: int = 0

    def in_words(self) -> str:
        what = f"approximate: no LoRA equals this adapter; rule {self.rule!r} comes near it"
        if self.change_error is None:
            return f"{what}, how near was not measured: give --calibration FILE"
        return (
            f"{what}: on {self.batches} texts of the calibration its outputs are off by {self.change_error:.1%} of what the adapter "
            f"changes, {self.output_error:.1%} of the outputs"
        )


def approximate(
    model: nn.Module, rule: str, adapter_name: str = "default", batches: Sequence[Mapping[str, Tensor]] = ()
) -> tuple[Approximation, Callable[[], None]]:
    """Makes a live adapter a plain one in place, by one of its method's rules, and measures what that changes.

    Args:
        rule: one of the config's `approximations`.
        batches: keyword arguments of the model's forward, whose result has `logits`. None: nothing is measured.

    Returns:
        What was measured, and a function that takes it back.

    Raises:
        RankfoldError: a method or rule without approximation.
    """
    config: Any = getattr(model, "peft_config", {}).get(adapter_name)
    method = registry.get(config.method) if isinstance(config, LowRankConfig) else None
    if method is None or method.approximate is None or config.fixed:
        raise RankfoldError(
            f"approximate={rule!r}: adapter {adapter_name!r} has an exact fold, or none at all; leave approximate out"
        )
    swap = method.approximate(model, rule, adapter_name)
    if not batches:
        return Approximation(rule), swap
    layers = [m for m in model.modules() if isinstance(m, AdaptedLayer)]
    off = change = size = 0.0
    training = model.training
    try:
        model.eval()
        for batch in batches:
            near = _logits(model, batch)
            swap()
            live = _logits(model, batch)
            swap()
            try:
                for layer in layers:
                    layer.enable_adapters(False)
                base = _logits(model, batch)
            finally:
                for layer in layers:
                    layer.enable_adapters(True)
            off += float((near - live).square().sum())
            change += float((live - base).square().sum())
            size += float(live.square().sum())
    finally:
        model.train(training)
    return Approximation(rule, (off / change) ** 0.5 if change else 0.0, (off / size) ** 0.5, len(batches)), swap


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    device = next(model.parameters()).device
    with torch.no_grad():
        return model(**{k: v.to(device) for k, v in batch.items()}).logits.float()
