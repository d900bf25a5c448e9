"""An optimiser by its name: for a bare loop, and for the trainers of transformers and TRL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rankfold.optim.options import check_lr
from rankfold.optim.registry import get


def create(name: str, model: torch.nn.Module, lr: float, **options: Any) -> torch.optim.Optimizer:
    """The optimiser called `name` for a bare loop; raises what its constructor raises."""
    cls: Any = get(name).cls
    return cls(model, lr, **options)


class Factory:
    """What a Trainer calls once its model is wrapped and placed: `Factory()(model, lr=..., ...)` makes the optimiser."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self) -> Callable[..., torch.optim.Optimizer]:
        return get(self.name).cls

    def __repr__(self) -> str:
        return f"rankfold.optim {self.name}"


def optimizer_cls_and_kwargs(
    name: str, model: torch.nn.Module | None = None, *, lr: float, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """For `Trainer(optimizer_cls_and_kwargs=...)` of transformers, and TRL's trainers.

    The Trainer does not pass its learning rate and weight decay on, so give them here. Its clipping acts on raw gradients: set
    `max_grad_norm=0` where the options say that they do not take it (`takes_clipping`: LoRA-RITE, LoRA-Pro).

    Args:
        name: a row's.
        model: checked at once, where it has its adapter already (a trainer with `peft_config` adds it later).
        lr: learning rate.
        options: the optimiser's.

    Raises:
        RankfoldError: an unknown optimiser or option, a value out of range, what `pairs` raises for the model.
    """
    row = get(name)
    row.check(**options)
    check_lr(row.cls.__name__, lr)
    if model is not None:
        row.cls.split(model)
    return Factory(name), {"lr": lr, **options}
