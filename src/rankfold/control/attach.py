"""Attaches controllers to an optimiser through torch's own hooks, so that they run in any loop.

handle = attach(model, optimizer, total_steps=1000)     # that is all: bare loop, Trainer, TRL, accelerate
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from rankfold.control.controller import Controller
from rankfold.errors import RankfoldError
from rankfold.host import registry
from rankfold.host.layer import AdaptedLayer

#: Where a controller's state lives inside the optimiser: param_groups are saved and restored whole by every torch
#: optimiser, so the state needs no file of its own and is in step with the moments it belongs to.
KEY = "rankfold"


@dataclass
class Attached:
    """Controllers that are attached, by adapter name. `remove()` detaches them."""

    controllers: dict[str, Controller]
    _handles: list[RemovableHandle] = field(default_factory=list)
    _skipped: bool = False

    def ranks(self) -> dict[str, dict[str, int]]:
        return {name: c.ranks() for name, c in self.controllers.items()}

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for controller in self.controllers.values():
            controller.release()
            for adapter in controller.adapters:  # from here on, a step is one without a controller
                adapter.scheduled = False
                vars(adapter).pop("_stepped_unscheduled", None)


#: A Trainer that is started again after an interrupt attaches to the same optimiser; two sets of hooks would run every
#: schedule twice.
_ATTACHED: WeakKeyDictionary[torch.optim.Optimizer, Attached] = WeakKeyDictionary()


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, *, total_steps: int | None = None) -> Attached:
    """Attaches the controller of every scheduled adapter of `model` that is trainable now; having none is not an error.

    What was attached to the same optimiser before is detached; its state carries on.

    Args:
        model: anything that contains adapted layers.
        optimizer: the one that steps their parameters (accelerate's wrapper is looked through).
        total_steps: optimiser steps of the whole run; schedules that need it say so.

    Raises:
        ValueError: a schedule that does not fit, or that needs total_steps and has none; an optimiser that holds only part of
            an adapter. The first step raises where a schedule has run and the optimiser has no state of it.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if optimizer in _ATTACHED:
        _ATTACHED.pop(optimizer).remove()
    controllers: dict[str, Controller] = {}
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    for name, (config, adapters) in _trainable(model, stepped).items():
        row = registry.get(config.method)
        controller_cls = row.controller
        if controller_cls is not None:
            _refuse_partial(name, adapters, stepped)
            _refuse_penalty(name, row.title, controller_cls, optimizer)
            controllers[name] = controller_cls(config, adapters, total_steps)
    attached = Attached(controllers)
    if not controllers:
        return attached

    def adopt() -> None:
        """Adopts the state that `optimizer.load_state_dict` loaded, before or after attach."""
        saved: dict[str, Any] = optimizer.param_groups[0].setdefault(KEY, {})
        for name, controller in controllers.items():
            if name not in saved:
                saved[name] = controller.state
            elif saved[name] is not controller.state:
                controller.load_state(saved[name])
                saved[name] = controller.state
            if controller.step or not _has_run(controller):
                controller.config.schedule = controller.progress() if controller.step else None

    def before(opt: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if (len(args) > 1 and args[1] is not None) or kwargs.get("closure") is not None:
            raise TypeError(
                "rankfold: optimizer.step(closure) makes its gradients where no controller can see them; call the closure "
                "yourself and then optimizer.step()"
            )
        adopt()
        for name, controller in controllers.items():
            _refuse_fresh_start(name, controller)
        attached._skipped = _amp_skips(opt)
        if attached._skipped:
            return
        for controller in controllers.values():
            with torch.enable_grad():
                loss = controller.extra_loss()
            if loss is not None and loss.requires_grad:  # not where all that it penalises is frozen
                _add_gradient(loss, controller)
            with torch.no_grad():
                controller.before_step(opt)

    def after(opt: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if attached._skipped:
            return
        for controller in reversed(controllers.values()):  # two may have changed the rate of one group, the second last
            controller.state["step"] += 1
            with torch.no_grad():
                controller.after_step(opt)
            controller.config.schedule = controller.progress()
            for adapter in controller.adapters:
                adapter.has_history = True

    adopt()  # raises before anything is hooked
    attached._handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    for controller in controllers.values():
        for adapter in controller.adapters:
            adapter.scheduled = True
    _ATTACHED[optimizer] = attached
    return attached


def _refuse_fresh_start(name: str, controller: Controller) -> None:
    """Refuses an optimiser without the state of a schedule that has run: starting again at 0 would give ranks back."""
    ran = (controller.config.schedule or {}).get("step", 0)
    if ran and not controller.step and _has_run(controller):
        raise RankfoldError(
            f"adapter {name!r}: its schedule has run {ran} steps, but this optimiser has no state of it, so it would start again "
            "at step 0. Load the optimiser's state from the same checkpoint (save_only_model=False), or set "
            f"model.peft_config[{name!r}].schedule = None to start a new schedule on purpose"
        )


def _has_run(controller: Controller) -> bool:
    """Whether these very adapters were trained under the schedule that their config records, here or before they were loaded; a
    used config may also be given to a new adapter."""
    return any(adapter.has_history for adapter in controller.adapters)


def _refuse_partial(name: str, adapters: list, stepped: set[int]) -> None:
    """Refuses an optimiser that holds only part of an adapter, such as the matrices in Muon with the gates in AdamW."""
    for adapter in adapters:
        held = {n: id(p) in stepped for n, p in adapter.named_parameters() if p.requires_grad}
        if not all(held.values()):
            have = ", ".join(n for n, there in held.items() if there)
            lack = ", ".join(n for n, there in held.items() if not there)
            raise RankfoldError(
                f"adapter {name!r} at {adapter.site.name}: the optimiser holds {have} but not {lack}, and a schedule needs one "
                "optimiser for the whole adapter; put all of its parameters into this one, in groups of their own if they need "
                "other settings"
            )


def _refuse_penalty(name: str, title: str, controller: type, optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimiser of pairs for a method whose penalty on the factors would be taken for the update's gradient."""
    if getattr(controller, "penalises_factors", False) and getattr(optimizer, "joint", False):
        raise RankfoldError(
            f"adapter {name!r}: {title} adds a penalty on the factors to the loss, and {type(optimizer).__name__} would take the "
            "penalty's gradient for one of the update; use LoraPlus or AdamW"
        )


def _trainable(model: nn.Module, stepped: set[int]) -> dict[str, tuple[Any, list]]:
    """Adapter name to its config and adapters, for those with a parameter (by id) that the optimiser steps. A frozen adapter's
    are in AdamW(model.parameters()) too, but are not stepped."""
    models: list[dict[str, Any]] = [c for m in model.modules() if (c := getattr(m, "peft_config", None))]
    found: dict[str, tuple[Any, list]] = {}
    for module in model.modules():
        if isinstance(module, AdaptedLayer):
            for name in module.lowrank_adapters:
                for adapter in module.adapters([name]):
                    if not any(id(p) in stepped for p in adapter.parameters()):
                        continue
                    own = (c[name] for c in models if name in c and c[name] is adapter.config)
                    config = next(own, None) or next(c[name] for c in models if name in c)
                    first, adapters = found.setdefault(name, (config, []))
                    if config is not first:
                        raise RankfoldError(
                            f"two adapted models in one module call their adapter {name!r}, and one optimiser keeps the state of a schedule "
                            "by this name; give each its own: get_peft_model(model, config, adapter_name=...)"
                        )
                    adapters.append(adapter)
    return found


def _amp_skips(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the coming step does nothing. A fused optimiser unscales and skips inside its kernel, so that GradScaler
    calls its step all the same; what controllers see must be unscaled before."""
    found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    if found_inf is not None and bool(found_inf):
        return True
    if scale is not None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.div_(scale.to(p.grad.device))
        optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
    return False


def _add_gradient(loss: torch.Tensor, controller: Controller) -> None:
    params = [p for a in controller.adapters for p in a.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    for p, g in zip(params, grads, strict=True):
        if g is not None:
            p.grad = g.to(p.dtype) if p.grad is None else p.grad.add_(g.to(p.grad.dtype))
