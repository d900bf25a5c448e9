"""Groups identical adapted layers of a model, so that one of each kind is measured."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from rankfold.host.layer import AdaptedLayer
from rankfold.host.peft_api import LoraLayer, in_out_features


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """PEFT's tuner layers and ours, by name."""
    found: Any = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    return found


def alike(layers: dict[str, nn.Module]) -> list[list[str]]:
    """The names in groups of the same class, and the same shapes and ranks throughout."""
    kinds: dict[Hashable, list[str]] = {}
    for name, layer in layers.items():
        shapes = tuple((n, tuple(p.shape), p.requires_grad) for n, p in layer.named_parameters())
        shared = tuple(tuple(p.shape) for a in getattr(layer, "lowrank_adapters", {}).values() for p in a.parameters())
        kinds.setdefault((type(layer), shapes, shared, _ranks(layer)), []).append(name)
    return list(kinds.values())


def _ranks(layer: nn.Module) -> tuple[int, ...]:
    """Of the updates of our adapters, which may have parts that belong to other layers."""
    adapters = layer.adapters(list(layer.lowrank_adapters)) if isinstance(layer, AdaptedLayer) else []
    return tuple(sum(block.rank for block in adapter.blocks()) for adapter in adapters)


def in_and_out(layer: nn.Module) -> tuple[int, int]:
    """The sizes of a linear layer, quantised and Conv1D included, or of what a tuner layer adapts."""
    if isinstance(layer, AdaptedLayer | LoraLayer):
        return layer.in_features, layer.out_features
    into, out = in_out_features(layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer)
    return int(into), int(out)  # pyright: ignore[reportArgumentType]
