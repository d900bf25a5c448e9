"""The modules of one type in depth order, and what each hands to those behind it while a forward runs: ResLoRA's shortcuts.

A chain is cut where the shape changes: only neighbours of equal (in, out) are linked. Nothing outlives a forward: what is handed on
lies in a `Pass`, which begins and ends with the forward of the module around them all, also when that raises. Every thread has
passes of its own: servers, and nn.DataParallel, run forwards beside each other.

Non-reentrant gradient checkpointing recomputes a layer in the backward, when its pass is long over. Where autograd's saved tensors are
hooked, as they are inside a checkpoint, every linked layer therefore keeps what it received in a `Receipt`, which lives as long as
that layer's part of the graph. Reentrant checkpointing has cut the gradient to the layer before, and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import local
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rankfold.errors import RankfoldError
from rankfold.host.adapter import Adapter, Group, Shared, Site

#: As many values of what a layer computed tell one forward from another.
SAMPLE = 64


@dataclass
class Pass:
    """One forward of the module around a chain.

    Args:
        backward: that it runs in, or -1.
        at: the place of the layer that was called last.
        values: by place, what later layers still need.
    """

    backward: int
    at: int = -1
    values: dict[int, Tensor] = field(default_factory=dict)


class Passes(local):
    """The passes that run in this thread, the innermost last."""

    def __init__(self) -> None:
        self.running: list[Pass] = []

    def __reduce__(self) -> tuple[type[Passes], tuple[()]]:
        """Copies and pickles begin outside any forward."""
        return Passes, ()


class Receipt:
    """What a layer received in one forward, for the time when it is computed again."""

    def __init__(self, received: Tensor, own: Tensor) -> None:
        self.received: Tensor | None = received
        self.sample = _sample(own)

    def spent(self, grad: Tensor) -> None:
        """The layer's gradient is there, so it was computed again."""
        self.received = None


class Chain(Shared):
    """Holds no tensor of its own. Its adapters lie in a list, out of the module registry: each belongs to its layer.

    Args:
        handing_on: whether the layers hand something on while a forward runs.
    """

    def __init__(self, group: Group, handing_on: bool = False) -> None:
        super().__init__()
        self.handing_on = handing_on
        sites = sorted(group.sites, key=lambda site: _depth(site.name))
        self.places = {site.name: place for place, site in enumerate(sites)}
        self.starts = _starts(sites)  # by place, where the run of equal shapes begins that it is in
        self.members: list[Adapter | None] = [None] * len(sites)
        self.passes = Passes()
        self.receipts: list[list[ref[Receipt]]] = [[] for _ in sites]
        self._hooks: list[RemovableHandle] = []

    def __getstate__(self) -> dict[str, Any]:
        """Receipts belong to a graph, which a copy does not have."""
        return {**self.__dict__, "receipts": [[] for _ in self.places]}

    def join(self, adapter: Adapter) -> None:
        self.members[self.places[adapter.site.name]] = adapter

    def first_of(self, name: str, count: int) -> int:
        """The place of the first of the `count` modules before this one that it is linked to; its own where there is none."""
        place = self.places[name]
        return max(self.starts[place], place - count)

    def before(self, name: str, count: int) -> list[Any]:
        """The adapters that it is linked to, the nearest first."""
        place = self.places[name]
        return self.members[self.first_of(name, count) : place][::-1]

    def names_before(self, name: str, count: int) -> list[str]:
        """The same by name, in depth order."""
        return list(self.places)[self.first_of(name, count) : self.places[name]]

    # Around every forward ----------------------------------------------------------------------------------------------

    def attached(self, model: nn.Module) -> None:
        if not self.handing_on:
            return
        around = _around(model, list(self.places))
        self._hooks = [
            around.register_forward_pre_hook(self._begin),
            around.register_forward_hook(self._end, always_call=True),
        ]

    def detached(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module: nn.Module, args: Any) -> None:
        self.passes.running.append(Pass(_backward()))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.passes.running:
            self.passes.running.pop()

    # What a layer asks ---------------------------------------------------------------------------------------------------

    def received(self, name: str, own: Tensor, count: int) -> tuple[Tensor | None, bool]:
        """The sum of what the `count` modules before handed on, and whether this is a first computation.

        Args:
            own: … × any, what this module hands on.

        Returns:
            None for the first module of a run; False where the layer is computed again for its gradients.

        Raises:
            RankfoldError: a module before was not called in this forward, this one was called twice, or they do not see the
                same tokens.
        """
        place, first, backward = self.places[name], self.first_of(name, count), _backward()
        if backward >= 0 and (receipt := self._receipt(place, own)) is not None:
            return receipt.received, False
        running = self.passes.running
        now = running[-1] if running and running[-1].backward == backward else None
        if now is None:
            if place > first:
                raise RankfoldError(_cut_off(name) if backward >= 0 else _alone(name))
            return None, backward < 0
        if now.at == len(self.places) - 1 and place == 0:
            now.at = -1  # the layers are run through once more
        if place <= now.at:
            raise RankfoldError(
                f"ResLoRA: {name} was called twice in one forward, or after a layer behind it, so which input its neighbours "
                'should see is not known; leave it out of target_modules, or choose shortcut="bs"'
            )
        missing = [n for n, p in self.places.items() if first <= p < place and p not in now.values]
        if missing:
            raise RankfoldError(
                f"ResLoRA: {name} needs what {missing[-1]} computes before it, which was not called in this forward (layers "
                'that are skipped, LayerDrop); call all of them, or choose shortcut="bs"'
            )
        received = None
        for before in range(place - 1, first - 1, -1):
            value = now.values[before]
            if value.shape != own.shape:
                raise RankfoldError(
                    f"ResLoRA: {name} sees inputs of another shape than the module of its type before it ({tuple(own.shape)} and "
                    f"{tuple(value.shape)} were to be added); leave one of them out of target_modules, or choose "
                    'shortcut="bs"'
                )
            value = value.to(own.device)
            received = value if received is None else received + value
        now.at = place
        now.values = {p: v for p, v in now.values.items() if p > place - count}
        if place + 1 < len(self.starts) and count and self.starts[place + 1] <= place:
            now.values[place] = own
        return received, backward < 0

    def keep(self, name: str, received: Tensor, own: Tensor, result: Tensor) -> None:
        """Keeps a receipt with `result`'s part of the graph, where it may be computed again."""
        if not _is_checkpointed() or not result.requires_grad:
            return
        receipt = Receipt(received, own)
        result.register_hook(receipt.spent)
        place = self.places[name]
        alive = [old for old in self.receipts[place] if (found := old()) is not None and found.received is not None]
        self.receipts[place] = [*alive, ref(receipt)]

    def _receipt(self, place: int, own: Tensor) -> Receipt | None:
        found = [r for kept in self.receipts[place] if (r := kept()) is not None and r.received is not None]
        if len(found) > 1:  # several forwards wait for their backward: that of the same values
            sample = _sample(own)
            alike = [r for r in found if torch.equal(r.sample, sample)]
            if len(alike) != 1:
                raise RankfoldError(
                    f"ResLoRA: {len(found)} forwards under gradient checkpointing wait for their backward, and which of them is "
                    "computed again here cannot be told; call backward() after each forward, or turn checkpointing off"
                )
            return alike[0]
        return found[0] if found else None


def _backward() -> int:
    """The number of the backward that this runs in, -1 outside any. A compiler traces no layer inside one."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def _is_checkpointed() -> bool:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    hooks: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]  (torch has no public name for it)
    return hooks._top_saved_tensors_default_hooks(False) is not None


def _sample(t: Tensor) -> Tensor:
    flat = t.detach().flatten()
    return flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE].clone()


def _alone(name: str) -> str:
    return (
        f"ResLoRA: {name} needs what the module of its type before it computes, and was called outside the model's forward; call "
        'the model, or choose shortcut="bs"'
    )


def _cut_off(name: str) -> str:
    return (
        f"ResLoRA: {name} is computed again in the backward, where what it received is gone: reentrant checkpointing has cut the "
        "shortcut, or the graph was used once before; set gradient_checkpointing_kwargs={'use_reentrant': False} and call "
        'backward() once per forward, or choose shortcut="bs"'
    )


def _depth(name: str) -> tuple[int, ...]:
    """The indices in a module's name; modules of one type have as many."""
    return tuple(int(part) for part in name.split(".") if part.isdecimal())


def _starts(sites: Sequence[Site]) -> list[int]:
    starts: list[int] = []
    for place, site in enumerate(sites):
        same = place and (site.in_features, site.out_features) == (
            sites[place - 1].in_features,
            sites[place - 1].out_features,
        )
        starts.append(starts[-1] if same else place)
    return starts


def _around(model: nn.Module, names: list[str]) -> nn.Module:
    """The innermost module that has them all and a forward of its own."""
    modules = dict(model.named_modules())
    parts = [name.split(".")[:-1] for name in names]
    common = 0
    while all(len(p) > common and p[common] == parts[0][common] for p in parts):
        common += 1
    path = parts[0][:common]
    while path and isinstance(modules[".".join(path)], nn.ModuleList | nn.ModuleDict):
        path.pop()
    return modules[".".join(path)]
