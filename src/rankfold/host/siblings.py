"""Layers that read one input – q, k and v; gate and up – computed together when the first of them is called.

    link_siblings(model, AdaptedLinear)      # once, after injection
    siblings.output(q, 0, x)                 # makes q's, k's and v's; the last two wait for their call with this x

Which layers those are is a closed list of names (`TOGETHER`), not something observed: what a step computes must not depend on what
an earlier one saw, or recomputing it in activation checkpointing would give other numbers. A layer that is called with another
input than its siblings computes its own output; only time is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING
from weakref import ref

import torch
from torch import Tensor, nn

from rankfold.kernel.linears import Member, low_rank_linears

if TYPE_CHECKING:
    from rankfold.host.layer import AdaptedLinear

#: End of the parent's name → its children that read one tensor. Cross-attention, whose k and v read another, is not here.
TOGETHER = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),  # Llama and its kin, BART's kind
    ("mlp", ("gate_proj", "up_proj")),
    ("attention.self", ("query", "key", "value")),  # BERT
    ("attention", ("q_proj", "k_proj", "v_proj")),  # ViT
    ("SelfAttention", ("q", "k", "v")),  # T5
    ("DenseReluDense", ("wi_0", "wi_1")),
)


class Siblings:
    """What adapted layers of one parent share while a batch passes: nothing, in between.

    It holds its layers weakly, so that a model is freed when it is let go; a copy of a layer joins again (`__setstate__`).

    Args:
        count: how many layers there are.
    """

    def __init__(self, count: int) -> None:
        self._layers: list[Callable[[], AdaptedLinear | None]] = [_nobody] * count
        self._waiting: dict[int, tuple[Tensor, tuple[int, bool], Tensor]] = {}  # place → input, its state, output

    def __getstate__(self) -> int:
        return len(self._layers)

    def __setstate__(self, count: int) -> None:
        Siblings.__init__(self, count)

    def join(self, layer: AdaptedLinear, place: int) -> None:
        self._layers[place] = ref(layer)

    def waiting(self, place: int, x: Tensor) -> Tensor | None:
        """The output of the layer at `place` for this input, if it was computed with its siblings'."""
        found = self._waiting.pop(place, None)
        return found[2] if found is not None and found[0] is x and found[1] == _state(x) else None

    def output(self, layer: AdaptedLinear, place: int, x: Tensor) -> Tensor | None:
        """The layer's output, or None where the siblings cannot be computed together now."""
        if self._layers[place]() is not layer:  # a replica of nn.DataParallel
            return None
        if (y := self.waiting(place, x)) is not None:
            return y
        self._waiting.clear()
        members = self._members()
        if members is None:
            return None
        outputs = low_rank_linears(x, members)
        self._waiting = {i: (x, _state(x), y) for i, y in enumerate(outputs) if i != place}
        return outputs[place]

    def _members(self) -> list[Member] | None:
        layers = [found() for found in self._layers]
        return None if any(layer is None for layer in layers) else members_together(layers)  # pyright: ignore[reportArgumentType]


def members_together(layers: Sequence[AdaptedLinear]) -> list[Member] | None:
    """Layers that read one input, for one computation; None where they differ in adapters or dropout, each must have its own
    mask, or one of them computes its own output."""
    members: list[Member] = []
    alike = None
    for layer in layers:
        member = None if replaced(layer) else layer.member()
        if member is None:
            return None
        names = [n for n in layer.active_adapters if n in layer.lowrank_adapters]
        own = names, [(t.dropout, t.own_mask) for t in member.terms if t.blocks]
        alike = alike or own
        if own != alike or any(dropout and own_mask for dropout, own_mask in own[1]):
            return None
        members.append(member)
    return members


def replaced(module: nn.Module) -> bool:
    """Whether an instance has a forward of its own, as accelerate gives it to fetch offloaded weights first."""
    return "forward" in vars(module)


def _nobody() -> None:
    return None


def link_siblings(model: nn.Module, layer_cls: type[AdaptedLinear]) -> None:
    """Tells every adapted layer of a model which siblings it has; called after each injection."""
    for found in _groups(model, layer_cls):
        together = Siblings(len(found)) if len(found) > 1 else None
        for place, layer in enumerate(found):
            layer.sit_with(together, place)


def _groups(model: nn.Module, layer_cls: type[AdaptedLinear]) -> Iterator[list[AdaptedLinear]]:
    for name, parent in model.named_modules():
        for ending, children in TOGETHER:
            if name == ending or name.endswith("." + ending):
                layers = [c for child in children if isinstance(c := getattr(parent, child, None), layer_cls)]
                for width in {layer.in_features for layer in layers}:
                    yield [layer for layer in layers if layer.in_features == width]


def _state(x: Tensor) -> tuple[int, bool]:
    """Its version, which a change in place raises, and whether what is computed now will have gradients."""
    return x._version, torch.is_grad_enabled()


def sharing_allowed(x: Tensor) -> bool:
    """Whether outputs may wait: not for inference tensors, which have no version, nor where a compiler traces, which cannot
    compare versions and may not change what a checkpointed region shares with others."""
    return not (torch.compiler.is_compiling() or x.is_inference())
