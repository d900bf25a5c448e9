"""Gated MLPs of transformers – SwiGLU, GeGLU – whose three layers are adapted, computed as one (gated_mlp.py).

    fuse_mlps(model, AdaptedLinear)      # once, after injection

Which modules those are is read from their code: `forward` must be literally down(act(gate(x)) * up(x)). Such a module's class is
exchanged for a subclass that asks its layers at every call and, where they have no adapters, are merged, hooked, or anything but
plain, does what its own class does.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from rankfold.host.siblings import has_patched_forward, members_together
from rankfold.kernel.gated_mlp import GELU, GELU_TANH, SILU, Activation, gated_mlp
from rankfold.kernel.layout import Member
from rankfold.kernel.linears import in_separate_order

#: Of modules, torch's and those that transformers calls silu and gelu, whatever their classes are named.
ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.SiLU: SILU,
    type(ACT2FN["silu"]): SILU,
    type(ACT2FN["gelu"]): GELU,
    type(ACT2FN["gelu_pytorch_tanh"]): GELU_TANH,
}
BODY = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"


def fuse_mlps(model: nn.Module, layer_cls: type) -> None:
    """Exchanges the class of every gated MLP of a model whose three layers are of `layer_cls`."""
    for module in model.modules():
        layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if all(isinstance(layer, layer_cls) for layer in layers) and _is_gated_mlp(type(module)):
            module.__class__ = _fused(type(module))


def unfuse_mlps(model: nn.Module) -> None:
    """Restores every module's own class."""
    for module in model.modules():
        if isinstance(module, FusedMlp):
            module.__class__ = _original(module)  # pyright: ignore[reportAttributeAccessIssue]


class FusedMlp(nn.Module):
    """The exchanged class's `forward`."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        activation = _activation(self)
        plain = activation is not None and not (in_separate_order() or kwargs or len(args) != 1 or _watched())
        members = _members(self) if plain else None
        if members is None or activation is None:
            return super().forward(*args, **kwargs)
        gate, up, down = members
        return gated_mlp(args[0], gate, up, down, activation)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The subclass is made anew where the module is unpickled or copied."""
        return _empty, (_original(self),), self.__dict__


def _original(module: FusedMlp) -> type[nn.Module]:
    after = type(module).__mro__
    return after[after.index(FusedMlp) + 1]


def _empty(original: type[nn.Module]) -> nn.Module:
    cls = _fused(original)
    return cls.__new__(cls)


@cache
def _fused(original: type[nn.Module]) -> type[nn.Module]:
    return type(f"Fused{original.__name__}", (FusedMlp, original), {"__module__": __name__})


@cache
def _is_gated_mlp(cls: type[nn.Module]) -> bool:
    """Whether the class's `forward(self, x)` returns `BODY`, whatever it calls its argument."""
    if issubclass(cls, FusedMlp):
        return False
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(cls.forward))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return False
    if not isinstance(function, ast.FunctionDef) or len(function.args.args) != 2 or function.decorator_list:
        return False
    argument = function.args.args[1].arg
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and node.id == argument:
            node.id = "x"
    lines = [ast.unparse(statement) for statement in function.body]
    return lines in ([f"return {BODY}"], [f"down_proj = {BODY}", "return down_proj"])


def _activation(module: Any) -> Activation | None:
    act = module.act_fn
    return None if _hooked(act) else ACTIVATIONS.get(type(act))


def _members(module: Any) -> list[Member] | None:
    """The three layers for the fused computation; None where one of them must compute its own output."""
    layers = [module.gate_proj, module.up_proj, module.down_proj]
    if any(_hooked(layer) or not hasattr(layer, "member") for layer in layers):
        return None
    first, last = members_together(layers[:2]), layers[2].member()
    return None if first is None or last is None else [*first, last]


def _watched() -> bool:
    """Whether somebody hooks every module (profilers, debuggers), and would not see layers that are computed together."""
    hooks = torch.nn.modules.module
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks or hooks._global_backward_hooks)


def _hooked(module: nn.Module) -> bool:
    return has_patched_forward(module) or bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
