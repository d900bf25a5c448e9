"""What the steps of any optimiser tell of adapters: one that is trained without its controller, one that gets no gradient."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from rankfold.errors import RankfoldError
from rankfold.host.peft_optimizers import refuse_peft_optimizer

#: Every adapter that has a schedule. A hook on all optimisers sees one that is stepped without its controller: a parameter's
#: version counter would not (fused kernels leave it alone, loading moves it).
_WATCHED: WeakSet[Any] = WeakSet()
#: Every adapter that no optimiser has stepped yet.
_NEW: WeakSet[Any] = WeakSet()


def _before_any_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    if _NEW:
        refuse_peft_optimizer(optimizer, list(_NEW))


def _after_any_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    waiting = [a for a in _WATCHED if not a.scheduled and not (a._stepped_unscheduled and a.config.allow_unscheduled)]
    if not waiting and not _NEW:
        return
    held = {id(p): p.grad is not None for g in optimizer.param_groups for p in g["params"] if p.requires_grad}
    _refuse_unscheduled(waiting, held)
    _notice_dead(held)


def _refuse_unscheduled(waiting: list[Any], held: dict[int, bool]) -> None:
    found = [a for a in waiting if any(held.get(id(p)) for p in a.parameters())]
    for adapter in found:
        adapter._stepped_unscheduled = True
    if not found:
        return
    said = (
        f"{type(found[0]).__name__} at {found[0].site.name} is being trained without its controller, so its ranks will "
        "never change: call rankfold.attach(model, optimizer, total_steps=...) before the loop, or give "
        "Trainer callbacks=[rankfold.AdapterCallback()]"
    )
    if not all(adapter.config.allow_unscheduled for adapter in found):
        raise RankfoldError(f"{said}; to train and save it all the same, set allow_unscheduled=True in its config")
    warnings.warn(said, stacklevel=3)


def _notice_dead(held: dict[int, bool]) -> None:
    """Names adapters whose module's weight is read past its forward (nn.MultiheadAttention's out_proj; peft#2200, #761)."""
    own = {
        a: [held[id(p)] for p in a._parameters.values() if p is not None and id(p) in held]
        for a in list(_NEW)
        if not a.resting
    }
    stepped = {a: any(grads) for a, grads in own.items() if grads}
    for adapter in stepped if any(stepped.values()) else ():
        _NEW.discard(adapter)
    dead = sorted(a.site.name for a, alive in stepped.items() if not alive)
    if dead and len(dead) < len(stepped):
        warnings.warn(
            f"{', '.join(dead[:5])}{f' and {len(dead) - 5} more' if len(dead) > 5 else ''}: the adapter got no gradient in the first "
            "step, so it learns nothing; the model may read that module's weight without calling the module. Leave it out "
            "with exclude_modules",
            stacklevel=3,
        )


register_optimizer_step_pre_hook(_before_any_step)
register_optimizer_step_post_hook(_after_any_step)


def watch(adapter: Any) -> None:
    """Looks after one more `Adapter`; called where it is made, copied or unpickled."""
    if adapter.site.kind != "experts":  # one that no token was routed to in a step has no gradient
        _NEW.add(adapter)
    if adapter.has_schedule:
        _WATCHED.add(adapter)
