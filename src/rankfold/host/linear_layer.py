"""AdaptedLinear: the layer over a linear base (nn.Linear, Conv1D, or quantised), fused with its adapters where it can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankfold.host.adapter import Adapter
from rankfold.host.layer import AdaptedLayer, Kind
from rankfold.host.siblings import Siblings, has_patched_forward, sharing_allowed
from rankfold.kernel.layout import Member
from rankfold.kernel.linears import low_rank_linear


class AdaptedLinear(AdaptedLayer):
    """A linear base with any number of adapters beside it."""

    def __init__(self, base_layer: nn.Module, kind: Kind, apply_tensor_subclass: Callable | None = None) -> None:
        super().__init__(base_layer, kind, apply_tensor_subclass)
        self.transposed = isinstance(self.get_base_layer(), Conv1D)
        self.siblings: Siblings | None = None
        self.index = 0  # among them

    def link_to(self, siblings: Siblings | None, index: int) -> None:
        """From now on this layer is computed together with those that read its input (siblings.py)."""
        self.siblings, self.index = siblings, index
        if siblings is not None:
            siblings.join(self, index)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.link_to(self.siblings, self.index)

    def adapted_output(self, adapters: list[Adapter], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            return super().adapted_output(adapters, x, *args, **kwargs)
        if self.siblings is not None and sharing_allowed(x):
            y = self.siblings.output(self, self.index, x)
            if y is not None:
                return y
        member = self.member()
        if member is None:
            return super().adapted_output(adapters, x)
        return low_rank_linear(x, member.weight, member.bias, member.terms)  # pyright: ignore[reportArgumentType]

    def member(self) -> Member | None:
        """This layer for the fused computation; None where it has nothing to add or its base must compute its own output."""
        if self.merged_adapters or self._disable_adapters:
            return None
        base, adapters = self.base_layer, self.adapters(self.active_adapters)
        if not adapters or not all(a.fixed for a in adapters) or (weight := _plain_weight(base)) is None:
            return None
        return Member(weight.T if self.transposed else weight, base.bias, [t for a in adapters for t in a.terms()])  # pyright: ignore[reportArgumentType]


def _plain_weight(base: nn.Module) -> Tensor | None:
    """The weight of a base that is nothing but x Wᵀ + b on an ordinary tensor: no subclass, hook, quantisation or shard."""
    if type(base) not in (nn.Linear, Conv1D) or has_patched_forward(base):
        return None
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return None
    weight = base.weight
    return weight if type(weight) in (nn.Parameter, Tensor) else None  # pyright: ignore[reportReturnType]
