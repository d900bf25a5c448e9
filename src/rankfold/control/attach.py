"""Controllers onto an optimiser, through torch's own hooks, so that they run in any loop.

handle = attach(model, optimizer, total_steps=1000)     # that is all: bare loop, Trainer, TRL, accelerate
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from rankfold import registry
from rankfold.config import LowRankConfig
from rankfold.control.controller import Controller
from rankfold.layer import AdaptedLinear

#: Where a controller's state lives inside the optimiser: param_groups are saved and restored whole by every torch
#: optimiser, so the state needs no file of its own and is in step with the moments it belongs to.
KEY = "rankfold"


@dataclass
class Attached:
    """Controllers that are attached, by adapter name. `remove()` detaches them."""

    controllers: dict[str, Controller]
    _handles: list[RemovableHandle] = field(default_factory=list)

    def ranks(self) -> dict[str, dict[str, int]]:
        return {name: c.ranks() for name, c in self.controllers.items()}

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, *, total_steps: int | None = None) -> Attached:
    """Attaches the controller of every trainable scheduled adapter of `model`; none is no error.

    Args:
        model: anything that contains adapted layers.
        optimizer: the one that steps their parameters (accelerate's wrapper is looked through).
        total_steps: optimiser steps of the whole run; schedules that need it say so.

    Raises:
        ValueError: a schedule that does not fit, or that needs total_steps and has none.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    controllers: dict[str, Controller] = {}
    configs: dict[str, LowRankConfig] = {}
    for name, (config, adapters) in _trainable(model, optimizer).items():
        controller_cls = registry.get(config.method).controller
        if controller_cls is not None:
            controllers[name], configs[name] = controller_cls(config, adapters, total_steps), config
            for adapter in adapters:
                adapter.scheduled = True
    attached = Attached(controllers)
    if not controllers:
        return attached

    def adopt() -> None:
        """Takes over what `optimizer.load_state_dict` brought, whether it was called before or after attach."""
        saved: dict[str, Any] = optimizer.param_groups[0].setdefault(KEY, {})
        for name, controller in controllers.items():
            if name not in saved:
                saved[name] = controller.state
            elif saved[name] is not controller.state:
                controller.load_state(saved[name])

    def before(opt: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        adopt()
        for controller in controllers.values():
            with torch.enable_grad():
                loss = controller.extra_loss()
            if loss is not None:
                _add_gradient(loss, controller)
            with torch.no_grad():
                controller.before_step(opt)

    def after(opt: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for name, controller in controllers.items():
            controller.state["step"] += 1
            with torch.no_grad():
                controller.after_step(opt)
            configs[name].schedule = controller.progress()

    attached._handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    adopt()
    return attached


def _trainable(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[LowRankConfig, list]]:
    """Adapter name to its config and adapters, for those that the optimiser steps."""
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    inner: Any = model.module if hasattr(model, "module") else model  # DDP
    configs = getattr(inner, "peft_config", {})
    found: dict[str, tuple[LowRankConfig, list]] = {}
    for module in inner.modules():
        if isinstance(module, AdaptedLinear):
            for name, adapter in module.lowrank_adapters.items():
                if any(id(p) in stepped for p in adapter.parameters()):
                    found.setdefault(name, (configs[name], []))[1].append(adapter)
    return found


def _add_gradient(loss: torch.Tensor, controller: Controller) -> None:
    params = [p for a in controller.adapters for p in a.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    for p, g in zip(params, grads, strict=True):
        if g is not None:
            p.grad = g.to(p.dtype) if p.grad is None else p.grad.add_(g.to(p.grad.dtype))
