"""Forward and backward of adapted linear layers that read one input, on plain tensors; the equations are in linears.py.

* x̃, h and the merged weight lie in scratch memory, or are made again, rather than kept;
* for many tokens in float32, W + ΔW is made once per pass and multiplied by (`FusedPass.merges`);
* both sums run in place in the GEMM that makes them (`addmm_`), into the base's output and into its input gradient;
* gate and scale go onto the small factor; no pass over an N×out tensor is spent on them;
* a frozen factor that only selects columns is a gather and a scatter (`Factors.down_index`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rankfold.kernel.dropout import add_dropped_columns_, add_dropped_product_, dropped
from rankfold.kernel.layout import FactorSlots, Layout
from rankfold.kernel.matmul import add_product_, linear, product
from rankfold.kernel.scratch import Scratch, buffer


class Columns(NamedTuple):
    """Frozen factors that only select columns: they are gathered and scattered, and nothing is multiplied.

    Args:
        index: int64, R: the columns.
    """

    index: Tensor


class FusedPass:
    """Forward and backward of several members, on the tensors of `flatten_for_autograd`."""

    def __init__(self, layout: Layout, tensors: Sequence) -> None:
        self.layout, self.tensors = layout, tensors
        self.inv_keeps, self.slots, self.ranks = layout.inv_keeps, layout.slots, layout.ranks
        self.weights = tensors[: layout.members]
        self.masks = tensors[layout.masks()]

    @property
    def kept(self) -> tuple:
        """The tensors as the backward needs them: without biases."""
        n = self.layout.members
        return (*self.weights, *([None] * n), *self.tensors[2 * n :])

    @property
    def reads_input(self) -> bool:
        """Whether the backward reads x: not where every `down` is frozen."""
        downs = [self.tensors[slot.down] for term in self.slots for own in term for slot in own]
        return any(t is not None and t.requires_grad for t in (*downs, *self.weights))

    def kept_hidden(self, hidden: Sequence[Tensor]) -> list[Tensor | None]:
        """h of every term as the backward needs it: not where every `up` and gate of the term is frozen."""
        slots = [[slot for own in term for slot in own] for term in self.slots]
        read = [[self.tensors[i] for slot in term for i in (slot.up, slot.gate)] for term in slots]
        return [
            h if any(t is not None and t.requires_grad for t in term) else None
            for h, term in zip(hidden, read, strict=True)
        ]

    def merges(self, member: int, tokens: int) -> bool:
        """Whether multiplying by W + ΔW is faster than by W and the factors, and as exact: in float32 and up, without dropout,
        for many tokens."""
        weight = self.weights[member]
        if weight is None or weight.dtype.itemsize < 4 or any(mask is not None for mask in self.masks):
            return False
        slots = [slot for term in self.slots for slot in term[member]]
        if any(self.tensors[i] is not None for slot in slots for i in (slot.down_index, slot.up_index)):
            return False
        rank = sum(ranks[member] for ranks in self.ranks)
        out, in_features = weight.shape
        # Multiply-adds: 2·N·R·(in + out) against 2·(R·in·out), and what two passes over W cost; more where it is larger than
        # the processor's caches. Measured: docs/performance.md.
        passes = 50 if weight.numel() * weight.element_size() <= 32 * 2**20 else 300
        return tokens * rank * (in_features + out) > in_features * out * (2 * rank + passes)

    def dropped(self, flat: Tensor, term: int, scratch: Scratch | None, overwrite: bool) -> Tensor:
        """x̃ of a term; in scratch memory or, where that is not needed afterwards, in the input's own."""
        mask = self.masks[term]
        if mask is None:
            return flat
        last = overwrite and term == len(self.masks) - 1
        return dropped(flat, mask, flat if last else buffer(scratch, "dropped input", flat.shape, flat))

    def down(self, members: Sequence[int], term: int, dtype: torch.dtype) -> Tensor | Columns:
        """ΣR × in, every D of one term one above the other; or its columns where all of them only select."""
        slots = [slot for i in members for slot in self.slots[term][i]]
        selected = [self.tensors[slot.down_index] for slot in slots if self.tensors[slot.down_index] is not None]
        if len(selected) == len(slots):
            return Columns(_stacked(selected))
        return _stacked([self.tensors[slot.down] for slot in slots]).to(dtype)

    def up(self, member: int, term: int, dtype: torch.dtype) -> tuple[Tensor | Columns, float]:
        """out × R of one member, gates multiplied into it (in their own float32), and the scale still to be multiplied; or its
        columns, as `down`."""
        slots, tensors = self.slots[term][member], self.tensors
        first = slots[0]
        if len(slots) == 1 and tensors[first.gate] is None and tensors[first.up_index] is None:
            return tensors[first.up].to(dtype), first.scale
        if all(slot.scale == first.scale and tensors[slot.gate] is None for slot in slots):
            selected = [tensors[slot.up_index] for slot in slots if tensors[slot.up_index] is not None]
            if len(selected) == len(slots):
                return Columns(_stacked(selected)), first.scale
            return _stacked([tensors[slot.up] for slot in slots], 1).to(dtype), first.scale
        parts = []
        for slot in slots:
            gate = tensors[slot.gate]
            parts.append(tensors[slot.up] * (slot.scale if gate is None else gate * slot.scale))
        return _stacked(parts, 1).to(dtype), 1.0

    def weight(self, member: int, merge: bool, scratch: Scratch | None) -> Tensor | None:
        """out × in: W, or W + ΔW, which is made again in the backward, not kept (RunLoRA, arXiv 2312.03415, calls the product
        X(W + UV)); None for a base that computes its own output."""
        weight = self.weights[member]
        if merge and weight is not None:
            weight = buffer(scratch, "merged weight", weight.shape, weight).copy_(weight)
            for t in range(len(self.masks)):
                up, scale = self.up(member, t, weight.dtype)
                down = self.down([member], t, weight.dtype)
                assert isinstance(up, Tensor)  # `merges` leaves columns alone
                assert isinstance(down, Tensor)
                add_product_(weight, up, down, alpha=scale)
        return weight

    # Forward --------------------------------------------------------------------------------------------------------

    def forward(
        self, flat: Tensor, scratch: Scratch | None, overwrite: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs (N × out) of all members, and h (N × R) of every term.

        Args:
            overwrite: `flat` is not needed afterwards, here as in `backward`, and may be overwritten.
        """
        members, terms = range(self.layout.members), range(len(self.masks))
        merges = [self.merges(i, flat.shape[0]) for i in members]
        bases_first = overwrite and any(mask is not None for mask in self.masks)  # dropout writes over what they read
        outputs = [self._base(i, flat, merges[i], scratch) for i in members] if bases_first else []
        hidden = [
            _project_down(self.dropped(flat, t, scratch, overwrite), self.down(members, t, flat.dtype)) for t in terms
        ]
        parts = [_split(h, self.ranks[t]) for t, h in enumerate(hidden)]
        for i in members:
            if not bases_first:  # what is added follows at once, while the output is in the processor's caches
                outputs.append(self._base(i, flat, merges[i], scratch))
            if not merges[i]:
                for t in terms:
                    up, scale = self.up(i, t, flat.dtype)
                    _add_up_projection_(outputs[i], parts[t][i], up, scale * self.inv_keeps[t])
        return outputs, hidden

    def _base(self, member: int, flat: Tensor, merge: bool, scratch: Scratch | None) -> Tensor:
        weight = self.weight(member, merge, scratch)
        if weight is None:
            return flat.new_zeros(flat.shape[0], self.tensors[self.slots[0][member][0].up].shape[0])
        return linear(flat, weight, self.tensors[self.layout.bias(member)])

    # Backward -------------------------------------------------------------------------------------------------------

    def backward(
        self,
        flat: Tensor | None,
        hidden: Sequence[Tensor | None],
        grads: Sequence[Tensor | None],
        need_x: bool,
        needed: Sequence[bool],
        scratch: Scratch | None,
        overwrite: bool = False,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """dx (N × in), and the gradients of the flat list's tensors, in their order.

        Args:
            flat: N × in, the input again; None where not `reads_input`.
            hidden: h of each term, as `kept_hidden`.
            grads: g of each member, … × out, or None.
            needed: which of the tensors want their gradient.
        """
        found: list[Tensor | None] = [None] * len(needed)
        rows = [g.reshape(-1, g.shape[-1]) for g in grads if g is not None]
        if not rows:
            return None, found
        like = next(t for t in (*hidden, flat, *rows) if t is not None)
        live = {i: g.reshape(-1, g.shape[-1]).to(like.dtype) for i, g in enumerate(grads) if g is not None}
        for i, g in live.items():
            if needed[i] and flat is not None:
                found[i] = product(g.T, flat)
            if needed[self.layout.bias(i)]:
                found[self.layout.bias(i)] = g.sum(0)
        merged = {i for i in live if need_x and self.merges(i, like.shape[0])}
        apart = [i for i in live if need_x and i not in merged]  # those whose factors, not W + ΔW, lead back to x
        joined = self._grad_hidden(flat, hidden, live, bool(apart), needed, found)
        for t, gh in enumerate(joined):
            if gh is not None and flat is not None:
                self._down_gradients(gh, self.dropped(flat, t, scratch, overwrite), t, list(live), needed, found)
        if not need_x:
            return None, found

        dx = None
        for i, g in live.items():
            weight = self.weight(i, i in merged, scratch)
            if weight is not None and dx is not None:
                add_product_(dx, g, weight, 1.0)
            elif weight is not None:
                dx = product(g, weight, out=flat if overwrite else None)
        if dx is None:
            dx = like.new_zeros(like.shape[0], self.tensors[self.slots[0][0][0].down].shape[1])
        for t, (gh, mask) in enumerate(zip(joined, self.masks, strict=True)):
            if gh is not None and apart:
                gh = _picked(gh, [self.ranks[t][i] for i in live], [k for k, i in enumerate(live) if i in apart])
                down = self.down(apart, t, like.dtype)
                if isinstance(down, Columns):
                    add_dropped_columns_(dx, gh, down.index, mask)
                else:
                    add_dropped_product_(dx, gh, down, mask)
        return dx, found

    def _grad_hidden(
        self,
        flat: Tensor | None,
        hidden: Sequence[Tensor | None],
        live: dict[int, Tensor],
        leads_to_x: bool,
        needed: Sequence[bool],
        found: list,
    ) -> list[Tensor | None]:
        """gh of each term, N × R over the live members, or None where nobody needs it; dU and dγ on the way."""
        terms = range(len(self.masks))
        wanted = [
            leads_to_x or (flat is not None and any(needed[slot.down] for i in live for slot in self.slots[t][i]))
            for t in terms
        ]
        parts = [() if h is None else _split(h, self.ranks[t]) for t, h in enumerate(hidden)]
        ghs: list[list[Tensor]] = [[] for _ in terms]
        scales: list[list[float]] = [[] for _ in terms]
        for i, g in live.items():
            for t in terms:
                slots = self.slots[t][i]
                if any(needed[slot.up] or needed[slot.gate] for slot in slots):
                    # M = hᵀ g and not gᵀ h: the faster order of the two (docs/performance.md)
                    self._up_gradients(product(parts[t][i].T, g), slots, self.inv_keeps[t], needed, found)
                if wanted[t]:
                    up, scale = self.up(i, t, g.dtype)
                    ghs[t].append(_project_grad_down(g, up))
                    scales[t].append(scale * self.inv_keeps[t])
        return [_side_by_side(own, by) if own else None for own, by in zip(ghs, scales, strict=True)]

    def _up_gradients(
        self, cross: Tensor, slots: Sequence[FactorSlots], inv_keep: float, needed: Sequence[bool], found: list
    ) -> None:
        """dU and dγ of one member's term, out of M = hᵀ g (R × out)."""
        for slot, m in zip(slots, _split(cross, [slot.rank for slot in slots], 0), strict=True):
            up, gate, c = self.tensors[slot.up], self.tensors[slot.gate], slot.scale * inv_keep
            if needed[slot.up]:
                # laid out as `up` is: DDP's buckets mind the strides, and at rank 1 autograd does not mend them
                c_up, d = c if gate is None else gate * c, torch.empty_like(up)
                wider = up.dtype.itemsize >= m.dtype.itemsize  # then cast first, which is faster; else round once
                found[slot.up] = d.copy_(m.T).mul_(c_up) if wider else torch.mul(m.T, c_up, out=d)
            if needed[slot.gate] and gate is not None:
                found[slot.gate] = (m.T * up.to(m.dtype)).sum(0, dtype=gate.dtype) * c

    def _down_gradients(
        self, gh: Tensor, x: Tensor, term: int, members: Sequence[int], needed: Sequence[bool], found: list
    ) -> None:
        """dD = ghᵀ x̃ of every block of a term."""
        slots = [slot for i in members for slot in self.slots[term][i]]
        if any(needed[slot.down] for slot in slots):
            d = product(gh.T, x)
            for slot, part in zip(slots, _split(d, [slot.rank for slot in slots], 0), strict=True):
                if needed[slot.down]:
                    found[slot.down] = part.to(self.tensors[slot.down].dtype)

    # Differentiated twice -------------------------------------------------------------------------------------------

    def differentiable_backward(
        self, x: Tensor | None, grads: Sequence[Tensor | None], need_x: bool, needed: Sequence[bool]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """As `backward`, out of torch's own operations, so that autograd can differentiate the gradients again."""
        live = [i for i, g in enumerate(grads) if g is not None]
        if x is None:
            raise RuntimeError(
                "a backward with create_graph=True through adapters whose every `down` is frozen needs their input, which is not "
                "kept; run the forward inside rankfold.kernel.linears.separate_order()"
            )
        biases = {self.layout.bias(i): grads[i] for i in live if needed[self.layout.bias(i)]}
        wanted = [i for i, need in enumerate(needed) if need and i not in biases]
        with torch.enable_grad():
            outputs = [self.plain_output(x, i) for i in live]
            sources = ([x] if need_x else []) + [self.tensors[i] for i in wanted]
            given = [grads[i] for i in live]
            made = list(torch.autograd.grad(outputs, sources, given, create_graph=True, allow_unused=True))
        dx = made.pop(0) if need_x else None
        found: list[Tensor | None] = [None] * len(needed)
        for i, gradient in zip(wanted, made, strict=True):
            found[i] = gradient
        for i, g in biases.items():
            found[i] = g.flatten(0, -2).sum(0)  # pyright: ignore[reportOptionalMemberAccess]
        return dx, found

    def plain_output(self, x: Tensor, member: int) -> Tensor:
        """The member's output without its bias, … × out, op by op and with the masks that were drawn."""
        weight, y = self.weights[member], 0.0
        if weight is not None:
            y = F.linear(x, weight)
        for t, inv_keep in enumerate(self.inv_keeps):
            mask, seen = self.masks[t], x
            if mask is not None:
                seen = dropped(x.reshape(-1, x.shape[-1]), mask, differentiable=True).view(x.shape)
            for slot in self.slots[t][member]:
                down, up, gate = self.tensors[slot.down], self.tensors[slot.up], self.tensors[slot.gate]
                up = up * (slot.scale * inv_keep if gate is None else gate * (slot.scale * inv_keep))
                y = y + F.linear(F.linear(seen, down.to(x.dtype)), up.to(x.dtype))
        assert isinstance(y, Tensor)
        return y


def _split(t: Tensor, sizes: Sequence[int], dim: int = 1) -> Sequence[Tensor]:
    return (t,) if len(sizes) == 1 else torch.split_with_sizes(t, list(sizes), dim)


def _stacked(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _picked(joined: Tensor, ranks: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """The columns of `joined`, members' ranks side by side, that belong to the wanted ones among them."""
    if len(wanted) == len(ranks):
        return joined
    parts = _split(joined, ranks)
    return _stacked([parts[k] for k in wanted], 1)


def _side_by_side(parts: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """N × r of each member, joined, the scale multiplied in place: into N × R, not into N × in."""
    if len(set(scales)) == 1:
        return _stacked(parts, 1).mul_(scales[0])
    return _stacked([part.mul_(s) for part, s in zip(parts, scales, strict=True)], 1)


def _project_down(x: Tensor, down: Tensor | Columns) -> Tensor:
    """h = x Dᵀ, N × R."""
    return x.index_select(1, down.index) if isinstance(down, Columns) else linear(x, down)


def _project_grad_down(g: Tensor, up: Tensor | Columns) -> Tensor:
    """g U, N × R."""
    return g.index_select(1, up.index) if isinstance(up, Columns) else product(g, up)


def _add_up_projection_(y: Tensor, h: Tensor, up: Tensor | Columns, scale: float) -> None:
    """y += h Uᵀ · scale in place: no pass over N × out for the scale, nor for a gate, which is in `up`."""
    if isinstance(up, Columns):
        y.index_add_(1, up.index, h, alpha=scale)
    else:
        add_product_(y, h, up.T, alpha=scale)
