"""Computes all layers that share an input (q, k and v; gate and up) when the first of them runs.

    link_siblings(model, AdaptedLinear)      # once, after injection
    siblings.output(q, 0, x)                 # makes q's, k's and v's; the last two wait for their call with this x

Which layers those are is a closed list of names (`TOGETHER`), not something observed: what a step computes must not depend on what
an earlier one saw, or recomputing it in activation checkpointing would give other results. Outputs wait only while the parent's
own forward runs: a caller that asks the layers one by one gets each computed for itself, whatever it changes in between.
A layer that is called with another input than its siblings computes its own output; only time is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rankfold.kernel.layout import Member
from rankfold.kernel.linears import low_rank_linears

#: End of the parent's name → its children that read one tensor. Cross-attention, whose k and v read another, is not here.
TOGETHER = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),  # Llama and its kin, BART's kind
    ("mlp", ("gate_proj", "up_proj")),
    ("attention.self", ("query", "key", "value")),  # BERT
    ("attention", ("q_proj", "k_proj", "v_proj")),  # ViT
    ("SelfAttention", ("q", "k", "v")),  # T5
    ("DenseReluDense", ("wi_0", "wi_1")),
)

State = tuple[int, bool, torch.dtype | None]


class Sibling(Protocol):
    """What an adapted linear layer tells of itself."""

    siblings: Siblings | None
    in_features: int
    lowrank_adapters: nn.ModuleDict

    @property
    def active_adapters(self) -> list[str]: ...

    def member(self) -> Member | None: ...

    def link_to(self, siblings: Siblings | None, index: int) -> None: ...


class Siblings:
    """Caches the outputs of sibling layers within one forward pass of their parent; empty between passes.

    It holds its layers weakly, so that a model is freed when it is let go; a copy of a layer joins again (`__setstate__`).

    Args:
        count: how many layers there are.
    """

    def __init__(self, count: int) -> None:
        self._layers: list[Callable[[], Sibling | None]] = [_nobody] * count
        self._waiting: dict[int, tuple[Tensor, State, Tensor]] = {}  # index → input, its state, output
        self._inside = False  # whether the parent's forward runs
        self._hooks: list[RemovableHandle] = []

    def __getstate__(self) -> tuple[int, list[RemovableHandle]]:
        return len(self._layers), self._hooks

    def __setstate__(self, state: tuple[int, list[RemovableHandle]]) -> None:
        Siblings.__init__(self, state[0])
        self._hooks = state[1]

    def join(self, layer: Sibling, index: int) -> None:
        self._layers[index] = ref(layer)

    def watch(self, parent: nn.Module) -> None:
        """From now on outputs wait from the beginning of the parent's forward to its end."""
        self._hooks = [
            parent.register_forward_pre_hook(self._begin),
            parent.register_forward_hook(self._end, always_call=True),
        ]

    def part(self) -> None:
        """Lets the layers be computed one by one again."""
        for layer in (found() for found in self._layers):
            if layer is not None and layer.siblings is self:
                layer.link_to(None, 0)
        for hook in self._hooks:
            hook.remove()

    def _begin(self, parent: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._inside = True

    def _end(self, parent: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._inside = False
            self._waiting.clear()

    def waiting(self, index: int, x: Tensor) -> Tensor | None:
        """The output of the layer at `index` for this input, if it was computed with its siblings'."""
        found = self._waiting.pop(index, None)
        return found[2] if found is not None and found[0] is x and found[1] == _state(x) else None

    def output(self, layer: Sibling, index: int, x: Tensor) -> Tensor | None:
        """The layer's output, or None where the siblings cannot be computed together now."""
        if not self._inside or self._layers[index]() is not layer:  # a replica of nn.DataParallel
            return None
        if (y := self.waiting(index, x)) is not None:
            return y
        self._waiting.clear()
        members = self._members()
        if members is None:
            return None
        outputs = low_rank_linears(x, members)
        self._waiting = {i: (x, _state(x), y) for i, y in enumerate(outputs) if i != index}
        return outputs[index]

    def _members(self) -> list[Member] | None:
        layers = [found() for found in self._layers]
        return None if any(layer is None for layer in layers) else members_together(layers)  # pyright: ignore[reportArgumentType]


def members_together(layers: Sequence[Sibling]) -> list[Member] | None:
    """Layers that share an input, for one computation; None where they differ in adapters or dropout, each must have its own
    mask, or one of them computes its own output."""
    members: list[Member] = []
    alike = None
    for layer in layers:
        member = None if has_patched_forward(layer) else layer.member()
        if member is None:
            return None
        names = [n for n in layer.active_adapters if n in layer.lowrank_adapters]
        own = names, [(t.dropout, t.own_mask) for t in member.terms if t.blocks]
        alike = alike or own
        if own != alike or any(dropout and own_mask for dropout, own_mask in own[1]):
            return None
        members.append(member)
    return members


def has_patched_forward(module: object) -> bool:
    """Whether an instance has a forward of its own, as accelerate gives it to fetch offloaded weights first."""
    return "forward" in vars(module)


def _nobody() -> None:
    return None


def link_siblings(model: nn.Module, layer_cls: type) -> None:
    """Tells every adapted layer of a model which siblings it has; called after each injection.

    Args:
        layer_cls: the class of layers that can be computed together, a `Sibling`.
    """
    part_siblings(model)
    for parent, layers in _groups(model, layer_cls):
        together = Siblings(len(layers))
        together.watch(parent)
        for index, layer in enumerate(layers):
            layer.link_to(together, index)


def part_siblings(model: nn.Module) -> None:
    """Undoes `link_siblings`."""
    for siblings in [s for m in model.modules() if (s := getattr(m, "siblings", None)) is not None]:
        siblings.part()


def _groups(model: nn.Module, layer_cls: type) -> Iterator[tuple[nn.Module, list[Any]]]:
    for name, parent in model.named_modules():
        for ending, children in TOGETHER:
            if name == ending or name.endswith("." + ending):
                layers: list[Any] = [c for n in children if isinstance(c := getattr(parent, n, None), layer_cls)]
                for width in {layer.in_features for layer in layers}:
                    alike = [layer for layer in layers if layer.in_features == width]
                    if len(alike) > 1:
                        yield parent, alike


def _state(x: Tensor) -> State:
    """Its version, which a change in place raises, whether what is computed now will have gradients, and in which precision."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return x._version, torch.is_grad_enabled(), autocast


def sharing_allowed(x: Tensor) -> bool:
    """Whether outputs may wait: not for inference tensors, which have no version, nor where a compiler traces, which cannot
    compare versions and may not change what a checkpointed region shares with others."""
    return not (torch.compiler.is_compiling() or x.is_inference())
