"""Refuses PEFT's LoRA-aware optimisers on our adapters. They find A and B by the names `lora_A` and `lora_B`, which ours do not have.

`create_loraplus_optimizer` would give B the rate of A, and λ times that to the gates (peft#1504 is the same with heads).
`create_lorafa_optimizer` would train A, which LoRA-FA freezes. `create_riemannian_optimizer` raises an error of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from rankfold.errors import RankfoldError
from rankfold.host.peft_api import LoraFAOptimizer


def refuse_peft_optimizer(optimizer: torch.optim.Optimizer, adapters: Iterable[Any]) -> None:
    """Raises RankfoldError where one of these optimisers holds a parameter of one of the adapters."""
    if isinstance(optimizer, LoraFAOptimizer):
        function, instead = "create_lorafa_optimizer", "rankfold.optim.LoraFa(model, lr=...)"
    elif _is_loraplus(optimizer):
        function, instead = "create_loraplus_optimizer", "rankfold.optim.LoraPlus(model, lr=..., ratio=...)"
    else:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for adapter in adapters:
        if any(id(p) in held for p in adapter.parameters()):
            raise RankfoldError(
                f"{type(adapter).__name__} at {adapter.site.name}: PEFT's {function} finds A and B by the names lora_A and lora_B, "
                f"which the adapters of rankfold do not have, so it would train another method; use {instead}"
            )


def _is_loraplus(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the groups are those that `create_loraplus_optimizer` makes where no name has `lora_B` in it: matrices, no embedding,
    and all vectors at another rate. The function leaves no other trace."""
    groups = optimizer.param_groups
    if len(groups) != 4 or groups[1]["params"]:
        return False
    rates = [group.get("initial_lr", group["lr"]) for group in groups]  # a warm-up starts at 0
    shapes = [{p.ndim < 2 for p in group["params"]} for group in groups]
    return rates[2] == rates[3] != rates[0] and shapes[0] == {False} and shapes[2] | shapes[3] <= {True}
