"""Stacks pairs of one shape, so that one product serves all of their layers and one tensor holds their state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankfold.optim.pairs import Pair

#: Shape of each thing that is remembered of one pair, by its name.
Shapes = dict[str, tuple[int, ...]]


@dataclass
class Batch:
    """What a rule reads, and changes in place: L pairs of one shape at one step. All tensors are float32 at least.

    Args:
        pairs: whose these are.
        down: L × r × in; up: L × out × r.
        grad_down, grad_up: their gradients; grad_down is None where `down` is frozen.
        seen_down, seen_up: each factor as the other sees it, with the gate multiplied in. Those of the start of the step.
        scale: L × 1 × 1.
        state: what is remembered, L × ….
        step: which step this is for these pairs, from 1.
    """

    pairs: list[Pair]
    down: Tensor
    up: Tensor
    grad_down: Tensor | None
    grad_up: Tensor
    seen_down: Tensor
    seen_up: Tensor
    scale: Tensor
    state: dict[str, Tensor]
    step: int

    def finite(self) -> Tensor:
        """bool L: which pairs have gradients without NaN and infinity."""
        total = self.grad_up.sum((1, 2))
        return torch.isfinite(total if self.grad_down is None else total + self.grad_down.sum((1, 2)))


class Stack:
    """All pairs of one shape, type and device. Their state lies in one tensor per name, of which `optimizer.state` has the rows.

    Args:
        pairs: the pairs.
        shapes: what is remembered of one.
    """

    def __init__(self, pairs: list[Pair], shapes: Shapes) -> None:
        self.pairs, self.shapes = pairs, shapes
        self.scale = torch.tensor([p.scale for p in pairs], dtype=work_type(pairs[0].up), device=pairs[0].up.device)[:, None, None]  # fmt: skip
        self._kind = {_kind(p) for p in pairs}
        self._state: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._rows: list[dict[str, Tensor]] = []

    def fits(self) -> bool:
        """Whether its pairs still have the types and the device that they had when it was made."""
        return self._kind == {_kind(p) for p in self.pairs}

    def state(self, kept: Any) -> dict[str, Tensor]:
        """The stacked state; `kept` is the optimiser's. Stacked anew where its entries are not our rows: at the first step, and
        after a state was loaded or moved."""
        entries = [kept[pair.up] for pair in self.pairs]
        if not self._rows or any(
            "step" not in entry or any(entry.get(name) is not row[name] for name in self.shapes)
            for entry, row in zip(entries, self._rows, strict=True)
        ):
            up = self.pairs[0].up
            self._state = {}
            for name, shape in self.shapes.items():
                zero = torch.zeros(shape, dtype=work_type(up), device=up.device)
                self._state[name] = torch.stack([entry[name].to(zero) if name in entry else zero for entry in entries])
            self._rows = [{name: t[i] for name, t in self._state.items()} for i in range(len(entries))]
            for entry, row in zip(entries, self._rows, strict=True):
                entry.setdefault("step", 0)
                entry |= row
        return self._state

    def batches(self, kept: Any, with_down: bool, skipped: Set[Tensor]) -> list[tuple[Batch, Tensor | None]]:
        """Groups the pairs that have gradients and whose `up` is not in `skipped` by the steps they have taken (one group, unless
        some were left out before). With each batch come its indices in the stack, or None if it is the whole stack."""
        ready = [i for i, p in enumerate(self.pairs) if p.up not in skipped and _has_gradients(p, with_down)]
        if not ready:
            return []
        stacked = self.state(kept)
        by_step: dict[int, list[int]] = defaultdict(list)
        for i in ready:
            by_step[kept[self.pairs[i].up]["step"]].append(i)
        found = []
        for step, members in by_step.items():
            whole = len(members) == len(self.pairs)
            indices = None if whole else torch.tensor(members, device=self.scale.device)
            found.append((self._batch(members, indices, stacked, step + 1, with_down), indices))
        return found

    def _batch(
        self, members: list[int], indices: Tensor | None, stacked: dict[str, Tensor], step: int, with_down: bool
    ) -> Batch:
        pairs = [self.pairs[i] for i in members]
        down = self._side_by_side("down", [p.down.detach() for p in pairs])
        up = self._side_by_side("up", [p.up.detach() for p in pairs])
        seen_down, seen_up = down, up
        if pairs[0].gate is not None:
            gates = torch.stack([p.gate.values() for p in pairs if p.gate is not None]).to(up)
            seen_down, seen_up = gates[:, :, None] * down, up * gates[:, None]
        return Batch(
            pairs, down, up,
            self._side_by_side("grad_down", [_gradient(p.down) for p in pairs]) if with_down else None,
            self._side_by_side("grad_up", [_gradient(p.up) for p in pairs]),
            seen_down, seen_up,
            self.scale if indices is None else self.scale[indices],
            stacked if indices is None else {k: v[indices] for k, v in stacked.items()},
            step,
        )  # fmt: skip

    def _side_by_side(self, name: str, tensors: list[Tensor]) -> Tensor:
        """One tensor of all of them. A CPU's allocator gives large memory back to the system, and fresh pages cost more than the
        copy, so there it is kept for the next step (where the types agree, and for all pairs at once)."""
        work = work_type(tensors[0])
        if tensors[0].device.type != "cpu" or len(tensors) < len(self.pairs) or tensors[0].dtype != work:
            return torch.stack(tensors).to(work)
        if name not in self._buffers:
            self._buffers[name] = tensors[0].new_empty(len(tensors), *tensors[0].shape)
        return torch.stack(tensors, out=self._buffers[name])

    def write_back(self, batch: Batch, indices: Tensor | None, kept: Any, with_down: bool) -> None:
        """Stores what a rule has changed: factors, state and the count of steps."""
        if indices is not None:
            for name, t in batch.state.items():
                self._state[name][indices] = t
        params: list[Tensor] = [p.up for p in batch.pairs]
        values = list(batch.up.unbind())
        if with_down:
            params, values = [p.down for p in batch.pairs] + params, list(batch.down.unbind()) + values
        torch._foreach_copy_(params, values)  # pyright: ignore[reportPrivateImportUsage]
        for pair in batch.pairs:
            kept[pair.up]["step"] = batch.step


def work_type(t: Tensor) -> torch.dtype:
    """The type of the arithmetic on factors of the type of `t`."""
    return torch.promote_types(t.dtype, torch.float32)


def _kind(pair: Pair) -> tuple[object, ...]:
    return pair.up.dtype, pair.down.dtype, pair.up.device, pair.down.device


def by_shape(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Pairs that can lie in one stack; those of rank 0 are in none."""
    found: dict[tuple, list[Pair]] = defaultdict(list)
    for p in (p for p in pairs if p.rank):
        found[(*p.shape, p.gate is None, _kind(p))].append(p)
    return list(found.values())


def _has_gradients(pair: Pair, with_down: bool) -> bool:
    return pair.up.grad is not None or (with_down and pair.down.grad is not None)


def _gradient(p: Tensor) -> Tensor:
    """The gradient; zero where the other factor alone has one (its own is then zero, or the loss does not depend on it)."""
    return torch.zeros_like(p) if p.grad is None else p.grad
