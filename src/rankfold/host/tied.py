"""Keeps the base weight as it was before merging, once for all layers that share it.

Several layers may hold one parameter (Zamba2 ties the projections of its hybrid layers). What a merge adds lands in all of them, so
the copy that brings the weight back belongs to the weight, not to a layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Protocol
from weakref import ref

from torch import Tensor, nn


class _Layer(Protocol):
    base_weight: BaseWeight

    @property
    def merged(self) -> bool: ...

    @property
    def merged_adapters(self) -> list[str]: ...

    def get_base_layer(self) -> nn.Module: ...

    def unmerge(self) -> None: ...

    def set_base_weight(self, weight_data: Tensor) -> None: ...

    def merged_weight(self, names: Sequence[str]) -> Tensor: ...


class BaseWeight:
    """What the layers over one weight share. It holds them weakly; a copy of a layer joins again.

    Attributes:
        before: the weight before the first merge, in main memory; None while nothing is merged.
    """

    def __init__(self) -> None:
        self.before: Tensor | None = None
        self._layers: list[ref[_Layer]] = []

    def __reduce__(self) -> tuple:
        return BaseWeight, (), self.before

    def __setstate__(self, before: Tensor | None) -> None:
        self.before = before

    def join(self, layer: _Layer) -> None:
        if not any(found() is layer for found in self._layers):
            self._layers.append(ref(layer))

    def layers(self) -> list[_Layer]:
        return [layer for found in self._layers if (layer := found()) is not None and layer.base_weight is self]


def link_tied(layers: Sequence[tuple[str, _Layer]]) -> Iterator[list[str]]:
    """Lets layers whose base is one parameter share one `BaseWeight`; called after each injection.

    Args:
        layers: name and layer of every adapted layer of a model.

    Yields:
        The names of each group of layers that share a weight.
    """
    groups: dict[int, list[tuple[str, _Layer]]] = {}
    for name, layer in layers:
        groups.setdefault(id(getattr(layer.get_base_layer(), "weight", layer)), []).append((name, layer))
    for group in groups.values():
        shared = next((layer for _, layer in group if layer.merged), group[0][1]).base_weight
        for _, layer in group:
            layer.base_weight = shared
            shared.join(layer)
        if len(group) > 1:
            yield [name for name, _ in group]


def warn_tied(names: list[str]) -> None:
    """Says what merging does to layers with one weight."""
    warnings.warn(
        f"{', '.join(names[:3])}{' and others' if len(names) > 3 else ''} share one weight, and each has an adapter of its own. "
        "Merging adds all of their updates to that weight, so a merged model computes something else; fold the adapter instead, "
        "or leave all but one of them out with exclude_modules",
        stacklevel=2,
    )
