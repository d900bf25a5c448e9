"""Modules that are trained in full beside an adapter, in float32: narrower weights would round small steps away.

PEFT does so for the adapter's own parameters. The rest of the model keeps its type, so inputs are widened on the way in.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils._pytree import tree_map

from rankfold.io.models import ModelError


def train_in_float32(model: PeftModel, heads: list[str]) -> None:
    """Casts trained modules that are stored in fewer bits; nothing changes where there are none.

    Args:
        heads: children of the base model whose outputs stay float32. What follows any other module gets the type that it had.

    Raises:
        ModelError: of a frozen module one parameter is trained, such as a bias.
    """
    base: Any = model.get_base_model()
    last = {module for name in heads for module in getattr(base, name).modules()}
    found = [m for m in _outermost(model) if any(_is_narrow(p) for p in m.parameters())]
    for module in found:  # all are found before the first is cast: they may share weights
        if module not in last:
            narrow = next(p.dtype for p in module.parameters() if p.is_floating_point())
            module.register_forward_hook(functools.partial(_cast_outputs, narrow))
        module.register_forward_pre_hook(_widen_inputs, with_kwargs=True)
    for module in found:
        module.to(torch.float32)
    if left := next(((name, p.dtype) for name, p in model.named_parameters() if _is_narrow(p)), None):
        raise ModelError(
            f"method: it trains {left[0]} alone of its module, in {left[1]}, where small steps are rounded away; "
            "set model.dtype: float32"
        )


def _outermost(module: nn.Module) -> list[nn.Module]:
    """The largest modules that can be called and are trained whole."""
    parameters = list(module.parameters())
    container = isinstance(module, nn.ModuleDict | nn.ModuleList)
    if parameters and not container and all(p.requires_grad for p in parameters):
        return [module]
    return [found for child in module.children() for found in _outermost(child)]


def _is_narrow(p: nn.Parameter) -> bool:
    return p.requires_grad and p.is_floating_point() and p.dtype.itemsize < 4


def _cast(dtype: torch.dtype, values: Any) -> Any:
    def one(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return tree_map(one, values)


def _widen_inputs(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return _cast(torch.float32, (args, kwargs))


def _cast_outputs(dtype: torch.dtype, module: nn.Module, args: Any, output: Any) -> Any:
    return _cast(dtype, output)
