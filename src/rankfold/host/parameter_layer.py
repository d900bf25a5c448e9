"""AdaptedParameters: the layer over a module whose own parameters are adapted, as `target_parameters` names them: the fused
experts of transformers 5, one adapter per expert, and single matrices such as a router's.

Experts are computed one after the other, and only those that a token goes to: each as a linear layer fused with its adapter, so
neither base nor adapter costs anything for the others. Any other module runs its own forward with W + ΔW in place of W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from rankfold.errors import RankfoldError
from rankfold.host.adapter import Adapter
from rankfold.host.layer import AdaptedLayer, Kind
from rankfold.host.peft_api import check_adapters_to_merge
from rankfold.host.siblings import has_patched_forward
from rankfold.kernel.linears import low_rank_linear


class ParameterAdapters(nn.ModuleDict):
    """What one adapter name stands for at such a module: parameter → an `Adapter` per expert, or one.

    It answers what PEFT asks of an adapter, for all of them.
    """

    tensor_names: tuple[str, ...] = ()

    def each(self) -> list[Adapter]:
        return [adapter for stack in self.values() for adapter in stack]  # pyright: ignore

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return iter(dict.fromkeys(chain.from_iterable(adapter.parameters(recurse) for adapter in self.each())))


class AdaptedParameters(AdaptedLayer):
    """A module with adapters of its own parameters beside it."""

    def __init__(self, base_layer: nn.Module, kind: Kind, apply_tensor_subclass: Callable | None = None) -> None:
        super().__init__(base_layer, kind, apply_tensor_subclass)
        self.before: dict[str, Tensor] = {}  # merged parameters as they were, in main memory

    def adapters(self, names: Sequence[str]) -> list[Adapter]:
        held: list[Any] = [self.lowrank_adapters[n] for n in names if n in self.lowrank_adapters]
        return [adapter for one in held for adapter in one.each()]

    def of_parameter(self, name: str, names: Sequence[str]) -> list[list[Adapter]]:
        """For each expert the adapters of a parameter, those of `names`; one entry for a matrix."""
        held: list[Any] = [self.lowrank_adapters[n] for n in names if n in self.lowrank_adapters]
        return [list(of_one) for of_one in zip(*(one[name] for one in held if name in one), strict=True)]

    def adapted_parameters(self, names: Sequence[str]) -> list[str]:
        held: list[Any] = [self.lowrank_adapters[n] for n in names if n in self.lowrank_adapters]
        return list(dict.fromkeys(name for one in held for name in one))

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        held: Any = self.lowrank_adapters[adapter_name]
        for name in held:
            weight = self.get_base_layer().get_parameter(name)
            for adapter in held[name]:
                if not any(p.is_meta for p in adapter.parameters()):
                    adapter.to(device or weight.device, *([weight.dtype] if weight.is_floating_point() else []))

    # Forward --------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is not None:
            raise RankfoldError(
                "adapter_names: adapters of fused experts cannot be mixed in a batch, because routing takes its rows apart; run one "
                "adapter at a time"
            )
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        active = [] if self.merged else [n for n in self.active_adapters if n in self.lowrank_adapters]
        if not active:
            return self.base_layer(*args, **kwargs)
        base = self.get_base_layer()
        if is_routed(base) and not (is_watched(base) or torch.compiler.is_compiling()):
            return self._routed(base, active, *args, *kwargs.values())
        if any(a.dropout for a in self.adapters(active)) and self.training:
            raise RankfoldError(
                f"lora_dropout: {type(base).__name__} runs its own forward here, whose inputs cannot be dropped; set 0"
            )
        weights = {name: self._changed(name, active) for name in self.adapted_parameters(active)}
        return functional_call(base, weights, args, kwargs)

    def _changed(self, name: str, active: Sequence[str]) -> Tensor:
        """W + ΔW of all experts, differentiable."""
        weight = self.get_base_layer().get_parameter(name)
        if weight.is_meta and not any(p.is_meta for p in self.adapters(active)[0].parameters()):
            raise RankfoldError(
                f"{name} of {type(self.get_base_layer()).__name__} is offloaded, where it cannot be adapted"
            )
        return weight + self._delta(name, active).to(weight.dtype)

    def _delta(self, name: str, names: Sequence[str], detach: bool = False) -> Tensor:
        """The update of a parameter in its own layout."""
        weight = self.get_base_layer().get_parameter(name)
        deltas = []
        for adapters in self.of_parameter(name, names):
            blocks = [
                b.detach() if detach else b for a in adapters for b in a.update()
            ]  # not factors(): some are constants
            wide = [b.to(torch.promote_types(b.up.dtype, torch.float32)) if detach else b for b in blocks]
            deltas.append(torch.stack([b.delta() for b in wide]).sum(0))
        if weight.ndim == 2:
            return deltas[0]
        delta = torch.stack(deltas)
        return delta.transpose(1, 2) if in_by_out(self.get_base_layer()) else delta

    def _routed(
        self, base: Any, active: Sequence[str], hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """The experts' outputs for the tokens that go to them, weighed and summed per token.

        Args:
            hidden: … × hidden, as many rows as tokens.
            top_k_index, top_k_weights: tokens × k, which experts a token goes to, and how much each counts.
        """
        x, (tokens, k) = hidden.reshape(-1, hidden.shape[-1]), top_k_index.shape
        if not tokens:
            return torch.zeros_like(hidden)
        experts, order = top_k_index.reshape(-1).sort(stable=True)
        counts = torch.bincount(experts, minlength=base.num_experts).tolist()
        rows, first = x[order // k], "gate_up_proj" if base.has_gate else "up_proj"
        per_parameter = {name: self.of_parameter(name, active) for name in self.adapted_parameters(active)}
        outputs, start = [], 0
        for expert, count in enumerate(counts):
            if not count:
                continue
            h = rows[start : start + count]
            h = self._linear(base, first, expert, per_parameter, h)
            h = base._apply_gate(h) if base.has_gate else base.act_fn(h)
            outputs.append(self._linear(base, "down_proj", expert, per_parameter, h))
            start += count
        y = torch.cat(outputs)
        if base.has_post_expert_norm:
            y = base.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return y[back].view(tokens, k, -1).sum(1).to(x.dtype).view_as(hidden)

    def _linear(
        self, base: Any, name: str, expert: int, per_parameter: dict[str, list[list[Adapter]]], x: Tensor
    ) -> Tensor:
        weight = getattr(base, name)[expert]
        bias = getattr(base, f"{name}_bias")[expert] if base.has_bias else None
        if name not in per_parameter:
            return F.linear(x, weight.T if base.is_transposed else weight, bias)
        terms = [t for a in per_parameter[name][expert] for t in a.terms()]
        return low_rank_linear(x, weight.T if base.is_transposed else weight, bias, terms)

    # Merging --------------------------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter: str, parameter: str | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The update of one adapter in a parameter's own layout, at least float32.

        Args:
            parameter: its name; by default the only one.
        """
        return self._delta(parameter or self.adapted_parameters([adapter])[0], [adapter], detach=True)

    def _merged(self, names: Sequence[str]) -> Iterator[tuple[nn.Parameter, str, Tensor]]:
        for name in self.adapted_parameters(names):
            parameter = self.get_base_layer().get_parameter(name)
            merged = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            merged += self._delta(name, names, detach=True).to(merged.device, merged.dtype)
            yield parameter, name, merged.to(parameter.dtype)

    def merges_to_finite(self, names: Sequence[str]) -> bool:
        return all(bool(torch.isfinite(merged).all()) for *_, merged in self._merged(names))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As `AdaptedLayer.merge`, for every adapted parameter; each is kept in main memory as it was."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lowrank_adapters]
        if safe_merge and not self.merges_to_finite(names):
            raise RankfoldError(f"NaNs detected in the merged weights. The adapters {names} seem to be broken")
        for parameter, name, merged in self._merged(names):
            self.before.setdefault(name, parameter.data.to("cpu", copy=True))
            parameter.data = merged
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Brings every parameter back, bit for bit."""
        for name, before in self.before.items():
            parameter = self.get_base_layer().get_parameter(name)
            parameter.data = before.to(parameter.device, parameter.dtype, copy=True)
        self.before, self.merged_adapters = {}, []


def is_routed(base: Any) -> bool:
    """Whether a module computes routed experts as transformers' `use_experts_implementation` describes it, on this process."""
    described = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts", "_apply_gate")
    return all(hasattr(base, name) for name in described) and not base._is_expert_parallel


def is_watched(base: nn.Module) -> bool:
    """Whether somebody hooked the module or its forward, and would not see experts that are computed without it."""
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    return has_patched_forward(base) or any(hooks)


def in_by_out(base: Any) -> bool:
    """Whether its fused weights are experts × in × out."""
    return bool(getattr(base, "is_transposed", False))
