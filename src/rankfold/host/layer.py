"""AdaptedLinear: PEFT's tuner layer, once for all methods. It hosts any `Adapter` on a linear base."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankfold.errors import RankfoldError
from rankfold.host.adapter import Adapter
from rankfold.host.siblings import Siblings, replaced, sharing_allowed
from rankfold.kernel.linears import Member, low_rank_linear


class AdaptedLinear(nn.Module, BaseTunerLayer):
    """A linear base (nn.Linear, Conv1D, or quantised) with any number of adapters beside it.

    Args:
        base_layer: the module to adapt; kept as it is.
        apply_tensor_subclass: what torchao needs to quantise again after a merge.

    Raises:
        TypeError: a base that is none of these.
    """

    adapter_layer_names = ("lowrank_adapters",)

    def __init__(self, base_layer: nn.Module, apply_tensor_subclass: Callable | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lowrank_adapters = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        base = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(base, get_apply_tensor_subclass=apply_tensor_subclass)
        self.transposed = isinstance(base, Conv1D)
        self._weight_before_merge: Tensor | None = None
        # The model's shared state (tuner.py), in a tuple to stay out of the module registry
        self.shared_state: tuple[nn.ModuleDict | None] = (None,)
        self.siblings: Siblings | None = None
        self.place = 0  # among them
        self.in_features, self.out_features = _get_in_out_features(base)
        self.train(base_layer.training)

    def sit_with(self, siblings: Siblings | None, place: int) -> None:
        """From now on this layer is computed together with those that read its input (siblings.py)."""
        self.siblings, self.place = siblings, place
        if siblings is not None:
            siblings.join(self, place)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.sit_with(self.siblings, self.place)

    def add_adapter(self, name: str, adapter: Adapter, inference_mode: bool = False) -> None:
        """Hosts one more adapter, in the base's mode, device and dtype; it becomes trainable if it is active."""
        self.lowrank_adapters[name] = adapter.train(self.training)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Here and not on the tuner, because transformers' `model.delete_adapter` asks only the layers."""
        super().delete_adapter(adapter_name)
        (shared,) = self.shared_state
        if shared is not None and adapter_name in shared:
            del shared[adapter_name]

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """For the shared state too: this is how transformers freezes an adapter that it has loaded."""
        for adapter in self.lowrank_adapters.values():
            adapter.requires_grad_(requires_grad)
        return super().requires_grad_(requires_grad)

    def adapters(self, names: Sequence[str]) -> list[Adapter]:
        return [self.lowrank_adapters[n] for n in names if n in self.lowrank_adapters]  # pyright: ignore[reportReturnType]

    # Forward --------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if adapter_names is not None:
            return self._forward_mixed_batch(x, *args, adapter_names=adapter_names, **kwargs)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        together = self.siblings is not None and sharing_allowed(x) and not args and not kwargs
        if together and (y := self.siblings.output(self, self.place, x)) is not None:  # pyright: ignore[reportOptionalMemberAccess]
            return y
        adapters = [] if self.merged else self.adapters(self.active_adapters)
        if not adapters:
            return self.base_layer(x, *args, **kwargs)
        member = self.member() if not args and not kwargs else None
        if member is None:
            y = self.base_layer(x, *args, **kwargs)
            for adapter in adapters:
                y = adapter(y, x)
            return y
        return low_rank_linear(x, member.weight, member.bias, member.terms)  # pyright: ignore[reportArgumentType]

    def member(self) -> Member | None:
        """This layer for the fused computation; None where it has nothing to add or its base must compute its own output."""
        if self.merged_adapters or self._disable_adapters:
            return None
        base, adapters = self.base_layer, self.adapters(self.active_adapters)
        if not adapters or not all(a.fixed for a in adapters) or (weight := _plain_weight(base)) is None:
            return None
        return Member(weight.T if self.transposed else weight, base.bias, [a.term() for a in adapters])  # pyright: ignore[reportArgumentType]

    def _forward_mixed_batch(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """Row i of the batch through adapter `adapter_names[i]`; "__base__" is no adapter."""
        if len(adapter_names) != len(x):
            raise RankfoldError(f"adapter_names has {len(adapter_names)} names for a batch of {len(x)} rows")
        if self.merged:
            raise RankfoldError("adapter_names cannot be used while an adapter is merged; call unmerge_adapter() first")
        y = self.base_layer(x, *args, **kwargs)
        for name in dict.fromkeys(adapter_names):
            if name in self.lowrank_adapters:
                rows = torch.tensor([i for i, n in enumerate(adapter_names) if n == name], device=x.device)
                y = y.index_copy(0, rows, self.lowrank_adapters[name](y[rows], x[rows]).to(y.dtype))
        return y

    # Merging --------------------------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of one adapter in the base weight's own layout, at least float32."""
        factors = self.lowrank_adapters[adapter].factors()  # pyright: ignore[reportCallIssue]
        wide = torch.promote_types(factors.up.dtype, torch.float32)
        delta = factors.detach().to(wide).delta()
        return delta.T if self.transposed else delta

    def merged_weight(self, names: Sequence[str]) -> Tensor:
        """The base weight plus these adapters' updates, summed in float32 or wider and rounded once to its dtype."""
        with torch.no_grad():
            weight = self.get_base_weight()
            merged = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            for name in names:
                merged += self.get_delta_weight(name).to(merged.device, merged.dtype)
            return merged.to(weight.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters' updates to the base weight.

        The weight as it was is kept in main memory, so that `unmerge` brings it back bit for bit (a quantised base is
        requantised, which rounds).

        Args:
            safe_merge: check the merged weight first; raises ValueError and changes nothing if it is not finite.
            adapter_names: which; by default the active ones.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lowrank_adapters]
        if not names:
            return
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise TypeError(
                f"a base quantised with {backend.backend_name} cannot be merged into; fold the adapter instead"
            )
        merged = self.merged_weight(names)
        if safe_merge and not torch.isfinite(merged).all():
            raise RankfoldError(f"NaNs detected in the merged weights. The adapters {names} seem to be broken")
        with torch.no_grad():
            if backend is None and not self.merged:
                self._weight_before_merge = self.get_base_weight().to("cpu", copy=True)
            self.set_base_weight(merged)
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Takes all merged updates out again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        with torch.no_grad():
            if self._weight_before_merge is not None:
                self.set_base_weight(self._weight_before_merge.to(self.get_base_weight().device))
            else:
                weight = self.get_base_weight()
                for name in self.merged_adapters:
                    weight = weight - self.get_delta_weight(name).to(weight.device, weight.dtype)
                self.set_base_weight(weight)
        self._weight_before_merge = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` applies (`rankfold fold` does the same exactly, and faster)."""
        return adapter_name not in self.lowrank_adapters or self.adapters([adapter_name])[0].fixed


def _plain_weight(base: nn.Module) -> Tensor | None:
    """The weight of a base that is nothing but x Wᵀ + b on an ordinary tensor: no subclass, hook, quantisation or shard."""
    if type(base) not in (nn.Linear, Conv1D) or replaced(base):
        return None
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return None
    weight = base.weight
    return weight if type(weight) in (nn.Parameter, Tensor) else None  # pyright: ignore[reportReturnType]
