"""y = x Wᵀ + b + Σ ((drop(x) downᵀ) ⊙ gate · scale) upᵀ, forward and backward: the only hand-written autograd here.

What it does that a chain of modules does not (numbers in docs/performance.md):

* x is saved once, as the tensor its producer and its sibling layers already hold (where autocast must cast it, as the one
  copy that all siblings share), and not at all where every `down` is frozen;
* siblings – q, k and v – are one node: one down-projection, one mask, one pass over the input's gradient (siblings.py);
* gate and scale go onto the small factor; no pass over an N×out tensor is spent on them;
* the r-wide product h is kept (N·r numbers), so the backward needs no second look at x·downᵀ;
* for many tokens in float32, W + ΔW is made once a pass instead, and multiplied by (`Call.merges`);
* both sums run in place in the GEMM that makes them (`addmm_`), into the base's output and into its input gradient;
* a frozen factor that only selects columns is a gather and a scatter (`Factors.down_index`);
* dropout costs what it drops (dropout.py).

Factors are cast to the dtype of x (or autocast's), never x to theirs; their gradients are cast back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankfold.kernel.dropout import add_dropped_product_, drop_mask, dropped
from rankfold.kernel.factors import Factors
from rankfold.kernel.matmul import add_product_, linear, product
from rankfold.kernel.scratch import Scratch, scratch_for, take


class Term(NamedTuple):
    """What one adapter adds: the sum of its blocks' updates, all reading the same (dropped) input.

    Args:
        own_mask: the mask is for this layer alone, not for its siblings.
    """

    blocks: Sequence[Factors]
    dropout: float = 0.0
    own_mask: bool = False


#: Places in scratch memory (scratch.py) of the dropped input and of W + ΔW; whoever calls `Call` has those above.
DROPPED, MERGED = 0, 1

_order = "fused"


@contextmanager
def separate_order() -> Iterator[None]:
    """Inside, sums run in PEFT's order, base(x) + up(down(drop(x)))·scale, op by op: bit-equal to PEFT's LoRA in
    float32, differentiable twice, and slower. The fused order differs from it by rounding only."""
    global _order
    before, _order = _order, "separate"
    try:
        yield
    finally:
        _order = before


class Member(NamedTuple):
    """One of the linear layers that read one input.

    Args:
        weight: out × in; None for a base that computes its own output.
        bias: out, or None.
        terms: one per active adapter.
    """

    weight: Tensor | None
    bias: Tensor | None
    terms: Sequence[Term]


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]) -> Tensor:
    """The adapted linear layer, base product included.

    Args:
        x: … × in.
        weight: out × in.
        bias: out, or None.
        terms: one per active adapter.

    Returns:
        … × out, in the dtype that `F.linear(x, weight, bias)` has.
    """
    return low_rank_linears(x, [Member(weight, bias, terms)])[0]


def low_rank_linears(x: Tensor, members: Sequence[Member]) -> tuple[Tensor, ...]:
    """Several adapted linear layers that read one input, as q, k and v do: one down-projection for all of them, one dropout
    mask for each adapter, one pass over the input's gradient.

    Args:
        x: … × in.
        members: alike in the number of their terms and in each one's dropout; terms at the same place share a mask.

    Returns:
        For each member … × out, as `low_rank_linear`.
    """
    if _order == "separate":
        return tuple(_separate(F.linear(x, m.weight, m.bias), x, m.terms) for m in members)  # pyright: ignore
    return _apply(*to_compute_dtype(x, members))


def low_rank_update(y: Tensor, x: Tensor, terms: Sequence[Term]) -> Tensor:
    """y + Σ update(x): for a base that must compute its own output (quantised, hooked, sharded).

    Args:
        y: … × out, the base's output.
        x: … × in, its input.
        terms: one per active adapter.
    """
    if _order == "separate":
        return _separate(y, x, terms)
    if not any(term.blocks for term in terms):
        return y
    (update,) = _apply(x.to(_compute_dtype(x)), [Member(None, None, terms)])
    return y + update.to(y.dtype)


def _autocasts(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # there is none on "meta"


def _compute_dtype(x: Tensor) -> torch.dtype:
    if _autocasts(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def to_compute_dtype(x: Tensor, members: Sequence[Member]) -> tuple[Tensor, list[Member]]:
    """Input, weights and biases in the dtype that autocast, or else x, asks for."""
    dtype = _compute_dtype(x)
    cast = [
        Member(None if m.weight is None else m.weight.to(dtype), None if m.bias is None else m.bias.to(dtype), m.terms)
        for m in members
    ]
    return x.to(dtype), cast


def in_separate_order() -> bool:
    return _order == "separate"


def _separate(y: Tensor, x: Tensor, terms: Sequence[Term]) -> Tensor:
    for term in terms:
        if not term.blocks:
            continue
        dropped = F.dropout(x.to(term.blocks[0].down.dtype), term.dropout)  # once: the blocks of a term share it
        for f in term.blocks:
            h = F.linear(dropped.to(f.down.dtype), f.down)
            h = h if f.gate is None else h * f.gate
            y = (y + F.linear(h, f.up) * f.scale).to(y.dtype)
    return y


def _apply(x: Tensor, members: Sequence[Member]) -> tuple[Tensor, ...]:
    layout, tensors = flat_arguments(x, members)
    return _LowRankLinears.apply(x, layout, *tensors)  # pyright: ignore[reportReturnType]


class Placed(NamedTuple):
    """One `Factors` among the tensors of `flat_arguments`: where its five begin (`DOWN` …), and its numbers."""

    at: int
    rank: int
    scale: float


DOWN, UP, GATE, DOWN_INDEX, UP_INDEX = range(5)


class Layout(NamedTuple):
    """What is known of members that read one input, besides tensors.

    Args:
        members: how many.
        inv_keeps: 1/(1 − p) of each term.
        blocks: [term][member], each a sequence.
        ranks: [term][member], summed over the blocks.
    """

    members: int
    inv_keeps: tuple[float, ...]
    blocks: tuple[tuple[tuple[Placed, ...], ...], ...]
    ranks: tuple[tuple[int, ...], ...]


def flat_arguments(x: Tensor, members: Sequence[Member]) -> tuple[Layout, list[Tensor | None]]:
    """What autograd wants flat, of members that read x: numbers, and tensors – weights, biases, masks drawn here, five of every
    block."""
    terms = list(zip(*[[t for t in m.terms if t.blocks] for m in members], strict=True))
    tensors: list[Tensor | None] = [m.weight for m in members]
    tensors += [m.bias for m in members]
    inv_keeps, blocks, ranks = [], [], []
    for first, *_ in terms:
        mask, keep = drop_mask(x, first.dropout)
        tensors.append(mask)
        inv_keeps.append(1.0 / keep if keep else 0.0)
    for term in terms:
        blocks.append([])
        for own in term:
            blocks[-1].append([])
            for f in own.blocks:  # one of rank 0 too: DDP waits for its (empty) gradients
                blocks[-1][-1].append(Placed(len(tensors), f.rank, f.scale))
                tensors += (f.down, f.up, f.gate, f.down_index, f.up_index)
        ranks.append(tuple([sum([block.rank for block in own]) for own in blocks[-1]]))
    placed = tuple([tuple([tuple(own) for own in term]) for term in blocks])
    return Layout(len(members), tuple(inv_keeps), placed, tuple(ranks)), tensors


class _LowRankLinears(torch.autograd.Function):
    """See the module's docstring. Shapes inside: x N×in, y and g N×out; h and gh N×R, R the ranks of one term of all
    members side by side.

    The blocks of a term are joined for the products and split afterwards, however many blocks and members: one product
    makes h, one the gradient of every `down`, one what goes back to x. The joined copies are of factors, not of
    activations, and are made again in the backward rather than kept.
    """

    @staticmethod
    def forward(ctx, x, layout, *tensors):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.scratch = scratch_for(x)
        call = Call(layout, tensors)
        with no_autocast([x]):
            outputs, hidden = call.forward(x.reshape(-1, x.shape[-1]), ctx.scratch)
        ctx.layout, ctx.shape = layout, x.shape
        ctx.set_materialize_grads(False)  # one of the members may be left unused
        ctx.save_for_backward(x if call.reads_input else None, *hidden, *call.kept)
        return tuple([shaped(y, x.shape) for y in outputs])

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        with no_autocast(grads):
            x, *saved = ctx.saved_tensors
            terms = len(ctx.layout.inv_keeps)
            flat = None if x is None else x.reshape(-1, x.shape[-1])
            need_x, _, *needed = ctx.needs_input_grad
            scratch = None if flat is None else scratch_for(flat)
            call = Call(ctx.layout, saved[terms:])
            dx, others = call.backward(flat, saved[:terms], grads, need_x, needed, scratch)
            ctx.scratch = None  # who keeps an output keeps its node, but need not keep this
            return None if dx is None else dx.view(ctx.shape), None, *others


def shaped(y: Tensor, like: Sequence[int]) -> Tensor:
    """N × out as … × out: as a tensor of its own, since autograd forbids writing in place to a view that a Function returns."""
    return y if len(like) == 2 else torch.ops.aten._unsafe_view(y, (*like[:-1], y.shape[-1]))


def no_autocast(tensors: Sequence[Tensor | None]) -> AbstractContextManager:
    """For what runs in dtypes that are settled already."""
    t = next((t for t in tensors if t is not None), None)
    return nullcontext() if t is None or not _autocasts(t) else torch.autocast(t.device.type, enabled=False)


class Call:
    """One computation of several members: forward and backward, on the tensors of `flat_arguments`."""

    def __init__(self, layout: Layout, tensors: Sequence) -> None:
        self.members, self.inv_keeps, self.blocks, self.ranks = layout
        n = self.members
        self.tensors, self.weights, self.masks = tensors, tensors[:n], tensors[2 * n : 2 * n + len(self.ranks)]

    @property
    def kept(self) -> tuple:
        """The tensors as the backward needs them: without biases."""
        return (*self.weights, *([None] * self.members), *self.tensors[2 * self.members :])

    @property
    def reads_input(self) -> bool:
        """Whether the backward reads x: not where every `down` is frozen."""
        downs = [self.tensors[block.at + DOWN] for term in self.blocks for own in term for block in own]
        return any(t is not None and t.requires_grad for t in (*downs, *self.weights))

    def merges(self, member: int, tokens: int) -> bool:
        """Whether multiplying by W + ΔW is faster than by W and the factors, and as exact: in float32 and up, without dropout,
        for many tokens."""
        weight = self.weights[member]
        if weight is None or weight.dtype.itemsize < 4:
            return False
        starts = [block.at for term in self.blocks for block in term[member]]
        selecting = any(self.tensors[at + i] is not None for at in starts for i in (DOWN_INDEX, UP_INDEX))
        if selecting or any(mask is not None for mask in self.masks):
            return False
        rank = sum(ranks[member] for ranks in self.ranks)
        out, into = weight.shape
        # Numbers multiplied: 2·N·R·(in + out) against 2·(R·in·out), and what two passes over W cost; more where it is larger than
        # the processor's caches. Measured: docs/performance.md.
        passes = 50 if weight.numel() * weight.element_size() <= 32 * 2**20 else 300
        return tokens * rank * (into + out) > into * out * (2 * rank + passes)

    def dropped(self, flat: Tensor, term: int, scratch: Scratch | None, overwrite: bool) -> Tensor:
        """What the term sees of the input; in scratch memory or, where that is not needed afterwards, in the input's own."""
        mask = self.masks[term]
        if mask is None:
            return flat
        last = overwrite and term == len(self.masks) - 1
        return dropped(flat, mask, flat if last else take(scratch, DROPPED, flat.shape, flat))

    def down(self, members: Sequence[int], term: int, dtype: torch.dtype) -> Tensor:
        """ΣR × in, every `down` of one term one above the other; or int64, ΣR places, where all of them only select: then
        columns are gathered and scattered, and nothing is multiplied."""
        starts = [block.at for i in members for block in self.blocks[term][i]]
        places = [self.tensors[at + DOWN_INDEX] for at in starts if self.tensors[at + DOWN_INDEX] is not None]
        if len(places) == len(starts):
            return _stacked(places)
        return _stacked([self.tensors[at + DOWN] for at in starts]).to(dtype)

    def up(self, member: int, term: int, dtype: torch.dtype) -> tuple[Tensor, float]:
        """out × R of one member, gates multiplied into it (in their own float32), and the number still to be multiplied; or
        int64, R places, as `down`."""
        blocks, tensors = self.blocks[term][member], self.tensors
        at, _, scale = blocks[0]
        if len(blocks) == 1 and tensors[at + GATE] is None and tensors[at + UP_INDEX] is None:
            return tensors[at + UP].to(dtype), scale
        if all(block.scale == scale and tensors[block.at + GATE] is None for block in blocks):
            places = [tensors[block.at + UP_INDEX] for block in blocks if tensors[block.at + UP_INDEX] is not None]
            if len(places) == len(blocks):
                return _stacked(places), scale
            return _stacked([tensors[block.at + UP] for block in blocks], 1).to(dtype), scale
        parts = []
        for block in blocks:
            up, gate = tensors[block.at + UP], tensors[block.at + GATE]
            parts.append(up * (block.scale if gate is None else gate * block.scale))
        return _stacked(parts, 1).to(dtype), 1.0

    def weight(self, member: int, merge: bool, scratch: Scratch | None) -> Tensor | None:
        """out × in: W, or W + ΔW, which is made again in the backward, not kept (RunLoRA, arXiv 2312.03415, calls the product
        X(W + UV)); None for a base that computes its own output."""
        weight = self.weights[member]
        if merge and weight is not None:
            weight = take(scratch, MERGED, weight.shape, weight).copy_(weight)
            for t in range(len(self.masks)):
                up, scale = self.up(member, t, weight.dtype)
                add_product_(weight, up, self.down([member], t, weight.dtype), alpha=scale)
        return weight

    def forward(
        self, flat: Tensor, scratch: Scratch | None, overwrite: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs (N × out) of all members, and h (N × R) of every term.

        Args:
            overwrite: `flat` is not needed afterwards, here as in `backward`, and may be overwritten.
        """
        members, terms = range(self.members), range(len(self.masks))
        merges = [self.merges(i, flat.shape[0]) for i in members]
        late = overwrite and any(mask is not None for mask in self.masks)  # dropout writes over what the base reads
        outputs = [self._base(i, flat, merges[i], scratch) for i in members] if late else []
        hidden = [_into(self.dropped(flat, t, scratch, overwrite), self.down(members, t, flat.dtype)) for t in terms]
        parts = [_parted(h, self.ranks[t]) for t, h in enumerate(hidden)]
        for i in members:
            if not late:  # what is added follows at once, while the output is in the processor's caches
                outputs.append(self._base(i, flat, merges[i], scratch))
            for t in terms if not merges[i] else ():
                up, scale = self.up(i, t, flat.dtype)
                _add_out_of_(outputs[i], parts[t][i], up, scale * self.inv_keeps[t])
        return outputs, hidden

    def _base(self, member: int, flat: Tensor, merge: bool, scratch: Scratch | None) -> Tensor:
        weight = self.weight(member, merge, scratch)
        if weight is None:
            return flat.new_zeros(flat.shape[0], self.tensors[self.blocks[0][member][0].at + UP].shape[0])
        return linear(flat, weight, self.tensors[self.members + member])

    def backward(
        self,
        flat: Tensor | None,
        hidden: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        need_x: bool,
        needed: Sequence,
        scratch: Scratch | None,
        overwrite: bool = False,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradient of the input (N × in), and those of the tensors of `flat_arguments`, in their order.

        Args:
            flat: N × in, the input again; None where not `reads_input`.
            grads: … × out of each member, or None; needed: which of the tensors want theirs.
        """
        n = self.members
        like = next((t for t in (*hidden, flat, *grads) if t is not None), None)
        found: list[Tensor | None] = [None] * len(needed)
        if like is None or all(g is None for g in grads):
            return None, found
        live = {i: g.reshape(-1, g.shape[-1]).to(like.dtype) for i, g in enumerate(grads) if g is not None}
        for i, g in live.items():
            if needed[i] and flat is not None:
                found[i] = product(g.T, flat)
            if needed[n + i]:
                found[n + i] = g.sum(0)

        merges = [need_x and self.merges(i, like.shape[0]) for i in live]
        apart = [k for k, merge in enumerate(merges) if not merge] if need_x else []  # places in `live`
        downs = [[block for i in live for block in term[i]] for term in self.blocks]
        wants = [flat is not None and any(needed[block.at + DOWN] for block in blocks) for blocks in downs]
        parts = [_parted(h, self.ranks[t]) for t, h in enumerate(hidden)]
        ghs: list[list[Tensor]] = [[] for _ in hidden]
        scales: list[list[float]] = [[] for _ in hidden]
        for i, g in live.items():
            for t, inv_keep in enumerate(self.inv_keeps):
                blocks = self.blocks[t][i]
                if any(needed[block.at + UP] or needed[block.at + GATE] for block in blocks):
                    # as hᵀg, the faster order (shared/performance.md §3)
                    self._up_gradients(product(parts[t][i].T, g), blocks, inv_keep, needed, found)
                if wants[t] or apart:
                    up, scale = self.up(i, t, like.dtype)
                    ghs[t].append(_back_into(g, up))
                    scales[t].append(scale * inv_keep)
        joined = [_side_by_side(own, by) if own else None for own, by in zip(ghs, scales, strict=True)]
        for t, gh in enumerate(joined):
            if wants[t] and gh is not None and flat is not None:
                d = product(gh.T, self.dropped(flat, t, scratch, overwrite))
                for block, part in zip(downs[t], _parted(d, [block.rank for block in downs[t]], 0), strict=True):
                    if needed[block.at + DOWN]:
                        found[block.at + DOWN] = part.to(self.tensors[block.at + DOWN].dtype)

        dx = None
        for (i, g), merge in zip(live.items(), merges, strict=True) if need_x else ():
            weight = self.weight(i, merge, scratch)
            if weight is not None and dx is not None:
                add_product_(dx, g, weight)
            elif weight is not None:
                dx = product(g, weight, out=flat if overwrite else None)
        if need_x and dx is None:
            dx = like.new_zeros(like.shape[0], self.tensors[downs[0][0].at + DOWN].shape[1])
        for t, (gh, mask) in enumerate(zip(joined, self.masks, strict=True)):
            if dx is not None and gh is not None and apart:
                ranks, down = [self.ranks[t][i] for i in live], self.down(list(live), t, like.dtype)
                add_dropped_product_(dx, _picked(gh, ranks, apart, 1), _picked(down, ranks, apart, 0), mask)
        return dx, found

    def _up_gradients(
        self, cross: Tensor, blocks: Sequence[Placed], inv_keep: float, needed: Sequence[bool], found: list
    ) -> None:
        """The gradients of every `up` and gate of one member's term, out of hᵀg (R × out)."""
        for (at, _, scale), mine in zip(blocks, _parted(cross, [block.rank for block in blocks], 0), strict=True):
            up, gate, c = self.tensors[at + UP], self.tensors[at + GATE], scale * inv_keep
            if needed[at + UP]:
                # laid out as `up` is: DDP's buckets mind the strides, and at rank 1 autograd does not mend them
                c_up, d = c if gate is None else gate * c, torch.empty_like(up)
                wider = up.dtype.itemsize >= mine.dtype.itemsize  # then cast first, which is faster; else round once
                found[at + UP] = d.copy_(mine.T).mul_(c_up) if wider else torch.mul(mine.T, c_up, out=d)
            if needed[at + GATE] and gate is not None:
                found[at + GATE] = (mine.T * up.to(mine.dtype)).sum(0, dtype=gate.dtype) * c


def _parted(t: Tensor, sizes: Sequence[int], dim: int = 1) -> Sequence[Tensor]:
    return (t,) if len(sizes) == 1 else torch.split_with_sizes(t, list(sizes), dim)


def _stacked(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _picked(joined: Tensor, ranks: Sequence[int], places: Sequence[int], dim: int) -> Tensor:
    """What of `joined`, the members' ranks side by side, belongs to the members at `places`."""
    if len(places) == len(ranks):
        return joined
    parts = _parted(joined, ranks, dim)
    return _stacked([parts[k] for k in places], dim)


def _side_by_side(parts: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """N × r of each member, joined, the scale multiplied in place: into these few numbers, not into N × in."""
    if len(set(scales)) == 1:
        return _stacked(parts, 1).mul_(scales[0])
    return _stacked([part.mul_(s) for part, s in zip(parts, scales, strict=True)], 1)


def _into(x: Tensor, down: Tensor) -> Tensor:
    """x downᵀ, N × R."""
    return linear(x, down) if down.is_floating_point() else x.index_select(1, down)


def _back_into(g: Tensor, up: Tensor) -> Tensor:
    """g up, N × R."""
    return product(g, up) if up.is_floating_point() else g.index_select(1, up)


def _add_out_of_(y: Tensor, h: Tensor, up: Tensor, scale: float) -> None:
    """y += h upᵀ · scale in place: no pass over N × out for the scale, nor for a gate, which is in `up`."""
    if up.is_floating_point():
        add_product_(y, h, up.T, alpha=scale)
    else:
        y.index_add_(1, up, h, alpha=scale)
