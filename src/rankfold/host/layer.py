"""AdaptedLayer: PEFT's tuner layer, once for all methods and all kinds of modules. It hosts any `Adapter` and merges them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn

from rankfold.errors import RankfoldError
from rankfold.host.adapter import Adapter, forget, not_fixed
from rankfold.host.peft_api import check_adapters_to_merge
from rankfold.host.tied import BaseWeight
from rankfold.host.tied_adapter import TiedAdapter


def _as_it_is(delta: Tensor, weight: Tensor) -> Tensor:
    return delta


def _itself(weight: Tensor) -> Tensor:
    return weight


@dataclass(frozen=True)
class Kind:
    """One kind of module that can be adapted; the rows are in kinds.py.

    Args:
        name: what `Site.kind` says.
        fits: whether a base module is of this kind.
        layer: hosts its adapters.
        features: (in, out) of a base module's update.
        in_weight_layout: an update (out × in) in the layout of the base's weight, which is the second argument.
        as_matrix: a base's weight as out × in.
        keys: what a plain LoRA calls `down` and `up` at such a module.
        linear: whether it is out = weight · in and no more; some methods adapt nothing else.
    """

    name: str
    fits: Callable[[nn.Module], bool]
    layer: type[AdaptedLayer]
    features: Callable[[nn.Module], tuple[int, int]]
    in_weight_layout: Callable[[Tensor, Tensor], Tensor] = _as_it_is
    as_matrix: Callable[[Tensor], Tensor] = _itself
    keys: tuple[str, str] = ("lora_A.weight", "lora_B.weight")
    linear: bool = True


class AdaptedLayer(nn.Module, BaseTunerLayer):
    """A base module with any number of adapters beside it.

    Args:
        base_layer: the module to adapt; kept as it is.
        kind: what it is.
        apply_tensor_subclass: what torchao needs to quantise again after a merge.
    """

    adapter_layer_names = ("lowrank_adapters",)
    #: PEFT's `disable_input_dtype_casting` sets it; factors are cast to the dtype of x here, and x never is.
    cast_input_dtype_enabled: bool = True

    def __init__(self, base_layer: nn.Module, kind: Kind, apply_tensor_subclass: Callable | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.kind = kind
        self.lowrank_adapters = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        base = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(base, get_apply_tensor_subclass=apply_tensor_subclass)
        self.base_weight = BaseWeight()
        self.base_weight.join(self)
        # The model's shared state (tuner.py), in a tuple to stay out of the module registry
        self.shared_state: tuple[nn.ModuleDict | None] = (None,)
        self.in_features, self.out_features = kind.features(base)
        # What torch calls fixed about such a module: models read it, as Whisper does its convolutions' stride
        for name in getattr(base, "__constants__", ()):
            if not hasattr(self, name):
                setattr(self, name, getattr(base, name))
        self.train(base_layer.training)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.base_weight.join(self)

    def add_adapter(self, name: str, adapter: Any, inference_mode: bool = False) -> None:
        """Adds an adapter in the base's mode, device and dtype; it becomes trainable if it is active."""
        for one in adapter.modules():  # several, where an adapter has one for each expert
            if isinstance(one, Adapter) or one is adapter:
                one.tensor_names = tuple(one.state_dict())
        self.lowrank_adapters[name] = adapter.train(self.training)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Here and not on the tuner, because transformers' `model.delete_adapter` asks only the layers."""
        super().delete_adapter(adapter_name)
        (shared,) = self.shared_state
        if shared is not None and adapter_name in shared:
            forget(shared, adapter_name)

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
            self._check_mixed_batch(len(x), adapter_names)
        if self.disable_adapters:
            for layer in self.base_weight.layers() if self.merged else ():
                layer.unmerge()  # all of them: what they merged lies in this layer's weight too
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._forward_mixed_batch(x, *args, adapter_names=adapter_names, **kwargs)
        adapters = [] if self.merged else self.adapters(self.active_adapters)
        return self.adapted_output(adapters, x, *args, **kwargs) if adapters else self.base_layer(x, *args, **kwargs)

    def adapted_output(self, adapters: list[Adapter], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output plus what each adapter adds."""
        y = self.base_layer(x, *args, **kwargs)
        for adapter in adapters:
            y = self.added(adapter, y, x)
        return y

    def added(self, adapter: Adapter, y: Tensor, x: Tensor) -> Tensor:
        """y + what one adapter adds for the input x."""
        return adapter(y, x)

    def _forward_mixed_batch(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """Row i of the batch through adapter `adapter_names[i]`; "__base__" means no adapter."""
        y = self.base_layer(x, *args, **kwargs)
        for name in dict.fromkeys(adapter_names):
            if name in self.lowrank_adapters:
                rows = torch.tensor([i for i, n in enumerate(adapter_names) if n == name], device=x.device)
                (adapter,) = self.adapters([name])
                y = y.index_copy(0, rows, self.added(adapter, y[rows], x[rows]).to(y.dtype))
        return y

    def _check_mixed_batch(self, rows: int, adapter_names: list[str]) -> None:
        """Raises ValueError in PEFT's words, which callers may look for."""
        if len(adapter_names) != rows:
            raise RankfoldError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {rows} respectively."
            )
        if self.merged:
            raise RankfoldError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    # Turning up and down ----------------------------------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiplies the update of one adapter, as it was trained, by `scale`.

        Raises:
            RankfoldError: the layer is merged, or the update depends on the input.
        """
        for found in self.adapters([adapter]):
            if scale == found.multiplier:
                continue
            if self.merged:
                raise RankfoldError("the scale of a merged adapter cannot change; call unmerge_adapter() first")
            if not found.fixed:
                raise RankfoldError(not_fixed(f"set_scale: {type(found).__name__} at {found.site.name}", found.config))
            found.multiplier = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the active adapters by `scale` once more; raises RankfoldError as `set_scale`."""
        for name in self.active_adapters if scale != 1 else ():
            for adapter in self.adapters([name])[:1]:  # one scale for all experts of a name
                self.set_scale(name, adapter.multiplier * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Takes a factor back from the active adapters, all of them by default; raises RankfoldError as `set_scale`."""
        for name in self.active_adapters:
            for adapter in self.adapters([name])[:1]:
                self.set_scale(name, 1.0 if scale is None else adapter.multiplier / scale)

    # Merging --------------------------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of one adapter in the base weight's own layout, at least float32."""
        factors = self.lowrank_adapters[adapter].factors()  # pyright: ignore[reportCallIssue]
        wide = torch.promote_types(factors.up.dtype, torch.float32)
        return self.kind.in_weight_layout(factors.detach().to(wide).delta(), self.get_base_weight())

    def merged_weight(self, names: Sequence[str]) -> Tensor:
        """The base weight plus these adapters' updates, summed in float32 or wider and rounded once to its dtype."""
        with torch.no_grad():
            weight = self.get_base_weight()
            merged = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            for name in names:
                if not isinstance(self.lowrank_adapters[name], TiedAdapter):
                    merged += self.get_delta_weight(name).to(merged.device, merged.dtype)
            return merged.to(weight.dtype)

    def merges_to_finite(self, names: Sequence[str]) -> bool:
        return bool(torch.isfinite(self.merged_weight(names)).all())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters' updates to the base weight.

        The weight as it was is kept in main memory, so that `unmerge` brings it back bit for bit, also where other layers
        share it (a quantised base is requantised, which rounds).

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
        if backend is None and "weight" not in self.get_base_layer()._parameters:
            warnings.warn(
                f"the base weight under {type(self.get_base_layer()).__name__} is recomputed at every forward (parametrize, prune, "
                "weight_norm, spectral_norm), so what is merged into it is lost; make it permanent first, as "
                "torch.nn.utils.parametrize.remove_parametrizations does",
                stacklevel=2,
            )
        merged = self.merged_weight(names)
        if safe_merge and not torch.isfinite(merged).all():
            raise RankfoldError(
                f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken"
            )
        with torch.no_grad():
            if backend is None and self.base_weight.before is None:
                self.base_weight.before = self.get_base_weight().to("cpu", copy=True)
            self.set_base_weight(merged)
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Takes all merged updates out again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        names, self.merged_adapters = self.merged_adapters, []
        others = [layer for layer in self.base_weight.layers() if layer.merged]
        before = self.base_weight.before
        with torch.no_grad():
            if before is not None:
                now = self.get_base_weight()  # the model may have been moved or cast since
                self.set_base_weight(before.to(now.device, now.dtype, copy=True))
                for layer in others:
                    layer.set_base_weight(layer.merged_weight(layer.merged_adapters))
            else:
                weight = self.get_base_weight()
                for name in names:
                    weight = weight - self.get_delta_weight(name).to(weight.device, weight.dtype)
                self.set_base_weight(weight)
        if not others:
            self.base_weight.before = None

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` applies (`rankfold fold` does the same exactly, and faster)."""
        return adapter_name not in self.lowrank_adapters or self.adapters([adapter_name])[0].fixed
