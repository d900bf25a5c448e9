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
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankfold.dropout import add_dropped_product_, drop_mask, dropped
from rankfold.factors import Factors


@dataclass(frozen=True)
class Term:
    """What one adapter adds: the sum of its blocks' updates, all reading the same (dropped) input.

    Args:
        own_mask: the mask is for this layer alone, not for its siblings.
    """

    blocks: Sequence[Factors]
    dropout: float = 0.0
    own_mask: bool = False


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


@dataclass(frozen=True)
class Member:
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
    outputs = _LowRankLinears.apply(x, layout, *tensors)
    # out here, since autograd forbids writing in place to a view that a Function returns
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]


Layout = tuple[tuple[float, ...], tuple[tuple[tuple[float, ...], ...], ...]]


def flat_arguments(x: Tensor, members: Sequence[Member]) -> tuple[Layout, list[Tensor | None]]:
    """What autograd wants flat, of members that read x: numbers (1/keep of each term, scales[member][term][block]), and
    tensors (weights, biases, masks drawn here, those of every `Block`). `Call` sorts them again."""
    terms = [[t for t in m.terms if t.blocks] for m in members]
    masks: list[Tensor | None] = []
    keeps: list[float] = []
    for term in terms[0]:
        mask, keep = drop_mask(x, term.dropout)
        masks.append(mask)
        keeps.append(1.0 / keep if keep else 0.0)
    scales = tuple(tuple(tuple(f.scale for f in t.blocks) for t in own) for own in terms)
    # a rank-0 block too: DDP waits for its (empty) gradients
    blocks = [t for own in terms for term in own for f in term.blocks for t in Block.of(f)]
    return (tuple(keeps), scales), [*(m.weight for m in members), *(m.bias for m in members), *masks, *blocks]


class _LowRankLinears(torch.autograd.Function):
    """See the module's docstring. Shapes inside: x N×in, y and g N×out; h and gh N×R, R the ranks of one term of all
    members side by side.

    The blocks of a term are joined for the products and split afterwards, however many blocks and members: one product
    makes h, one the gradient of every `down`, one what goes back to x. The joined copies are of factors, not of
    activations, and are made again in the backward rather than kept.
    """

    @staticmethod
    def forward(ctx, x, layout, *tensors):  # pyright: ignore[reportIncompatibleMethodOverride]
        call = Call(layout, tensors)
        with no_autocast([x]):
            outputs, hidden = call.forward(x.reshape(-1, x.shape[-1]))
        ctx.layout, ctx.shape = layout, x.shape
        ctx.set_materialize_grads(False)  # one of the members may be left unused
        ctx.save_for_backward(x if call.reads_input else None, *hidden, *call.kept)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        with no_autocast(grads):
            x, *saved = ctx.saved_tensors
            terms = len(ctx.layout[0])
            flat = None if x is None else x.reshape(-1, x.shape[-1])
            need_x, _, *needed = ctx.needs_input_grad
            dx, others = Call(ctx.layout, saved[terms:]).backward(flat, saved[:terms], grads, need_x, needed)
            return None if dx is None else dx.view(ctx.shape), None, *others


def no_autocast(tensors: Sequence[Tensor | None]) -> AbstractContextManager:
    """For what runs in dtypes that are settled already."""
    t = next((t for t in tensors if t is not None), None)
    return nullcontext() if t is None or not _autocasts(t) else torch.autocast(t.device.type, enabled=False)


class Block(NamedTuple):
    """The tensors of one `Factors`, or what belongs to each of them: its gradient, whether that is wanted."""

    down: Any
    up: Any
    gate: Any
    down_index: Any
    up_index: Any

    @classmethod
    def of(cls, f: Factors) -> Block:
        return cls(f.down, f.up, f.gate, f.down_index, f.up_index)


class Joined(NamedTuple):
    """The factors of one term of several members, in the dtype of the products.

    Args:
        down: ΣR × in, the members' one above the other; ups: out × R of each member. Either may be int64 instead, R places:
            a factor that only selects, for which columns are gathered and scattered, and nothing is multiplied.
        scales: what is still to be multiplied; ranks: R of each member.
    """

    down: Tensor
    ups: Sequence[Tensor]
    scales: list[float]
    ranks: list[int]


class Call:
    """One computation of several members: the tensors of `flat_arguments`, sorted, forward and backward."""

    def __init__(self, layout: Layout, tensors: Sequence) -> None:
        self.inv_keeps, self.scales = layout
        n, terms = len(self.scales), len(self.inv_keeps)
        self.weights, self.masks = tensors[:n], tensors[2 * n : 2 * n + terms]
        self.biases = tensors[n : 2 * n]
        self.kept = (*self.weights, *([None] * n), *tensors[2 * n :])  # all that the backward needs: not the biases
        self.blocks = self.by_block(tensors[2 * n + terms :])
        # whether the backward reads x: not where every `down` is frozen
        downs = [block.down for own in self.blocks for term in own for block in term]
        self.reads_input = any(t is not None and t.requires_grad for t in (*self.weights, *downs))

    def by_block(self, flat: Sequence) -> list[list[list[Block]]]:
        """`flat` as blocks[member][term] has it."""
        it = iter(flat)
        return [[[Block(*(next(it) for _ in Block._fields)) for _ in s] for s in own] for own in self.scales]

    def joined(self, members: Sequence[int], term: int, dtype: torch.dtype) -> Joined:
        return _joined([self.blocks[i][term] for i in members], [self.scales[i][term] for i in members], dtype)

    def merges(self, member: int, tokens: int) -> bool:
        """Whether multiplying by W + ΔW is faster than by W and the factors, and as exact: in float32 and up, without dropout,
        for many tokens."""
        weight = self.weights[member]
        if weight is None or weight.dtype not in (torch.float32, torch.float64):
            return False
        blocks = [block for term in self.blocks[member] for block in term]
        selecting = any(block.down_index is not None or block.up_index is not None for block in blocks)
        if selecting or any(mask is not None for mask in self.masks):
            return False
        rank = sum(len(block.down) for block in blocks)
        out, into = weight.shape
        # Numbers multiplied: 2·N·R·(in + out) against 2·(R·in·out), and what two passes over W cost; more where a fresh matrix of
        # its size is mapped anew by the allocator. Measured: docs/performance.md.
        passes = 100 if weight.numel() * weight.element_size() <= 32 * 2**20 else 300
        return tokens * rank * (into + out) > into * out * (2 * rank + passes)

    def weight(self, member: int, merge: bool) -> Tensor | None:
        """out × in: W, or W + ΔW, which is made again in the backward, not kept (RunLoRA, arXiv 2312.03415, calls the product
        X(W + UV)); None for a base that computes its own output."""
        weight = self.weights[member]
        if weight is not None and merge:
            for t in range(len(self.masks)):
                factors = self.joined([member], t, weight.dtype)
                weight = torch.addmm(weight, factors.ups[0], factors.down, alpha=factors.scales[0])
        return weight

    def forward(self, flat: Tensor, scratch: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs (N × out) of all members, and h (N × R) of every term.

        Args:
            scratch: `flat` is not needed afterwards, here as in `backward`, and may be overwritten.
        """
        merges = [self.merges(i, len(flat)) for i in range(len(self.weights))]
        outputs = []
        for i, bias in enumerate(self.biases):
            weight = self.weight(i, merges[i])
            if weight is not None:
                outputs.append(F.linear(flat, weight, bias))
            else:
                outputs.append(flat.new_zeros(len(flat), self.blocks[i][0][0].up.shape[0]))
        hidden = []
        for t, (mask, inv_keep) in enumerate(zip(self.masks, self.inv_keeps, strict=True)):
            factors = self.joined(range(len(outputs)), t, flat.dtype)
            h = _into(dropped(flat, mask, scratch and t == len(self.masks) - 1), factors.down)
            for i, (y, part) in enumerate(zip(outputs, h.split(factors.ranks, 1), strict=True)):
                if not merges[i]:
                    _add_out_of_(y, part, factors.ups[i], factors.scales[i] * inv_keep)
            hidden.append(h)
        return outputs, hidden

    def backward(
        self,
        flat: Tensor | None,
        hidden: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        need_x: bool,
        needed: Sequence,
        scratch: bool = False,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradient of the input (N × in), and those of the tensors of `flat_arguments`, in their order.

        Args:
            flat: N × in, the input again; None where not `reads_input`.
            grads: N × out of each member, or None; needed: which of the tensors want theirs.
        """
        n, terms = len(self.scales), len(self.inv_keeps)
        need_weights, need_biases, need = needed[:n], needed[n : 2 * n], self.by_block(needed[2 * n + terms :])
        if all(g is None for g in grads):
            return None, [None] * len(needed)
        like = next(t for t in (*hidden, flat, *grads) if t is not None)
        live = [(i, g.to(like.dtype)) for i, g in enumerate(grads) if g is not None]
        indices, by_member = [i for i, _ in live], dict(live)
        d_weights: list[Tensor | None] = [None] * n
        if flat is not None:
            d_weights = [by_member[i].T @ flat if w and i in by_member else None for i, w in enumerate(need_weights)]
        d_biases = [by_member[i].sum(0) if b and i in by_member else None for i, b in enumerate(need_biases)]

        merges = {i: need_x and self.merges(i, len(like)) for i in indices}
        apart = [k for k, i in enumerate(indices) if not merges[i]]  # places in `live`
        out: list[list[list[list[Tensor | None]]]] = [
            [[[None] * len(Block._fields) for _ in s] for s in own] for own in self.scales
        ]
        to_x: list[tuple[Tensor, Tensor, Tensor | None]] = []  # what each term sends back: N×R, R×in, mask
        for t, (mask, inv_keep, h) in enumerate(zip(self.masks, self.inv_keeps, hidden, strict=True)):
            h_parts = h.split([sum(len(block.down) for block in own[t]) for own in self.blocks], 1)
            for i, g in live:
                if any(w.up or w.gate for w in need[i][t]):
                    cross = (h_parts[i].T @ g).T  # out×r; as (hᵀg)ᵀ, the faster order (shared/performance.md §3)
                    _up_gradients(cross, self.blocks[i][t], need[i][t], self.scales[i][t], inv_keep, out[i][t])
            want_down = any(w.down for i in indices for w in need[i][t])
            if not want_down and not (need_x and apart):
                continue
            factors = self.joined(indices, t, like.dtype)
            ghs = [_back_into(g, up) for (_, g), up in zip(live, factors.ups, strict=True)]
            gh = _side_by_side(ghs, [scale * inv_keep for scale in factors.scales])
            if want_down and flat is not None:
                d = gh.T @ dropped(flat, mask, scratch and t == terms - 1)
                by_block = [zip(self.blocks[i][t], need[i][t], out[i][t], strict=True) for i in indices]
                _down_gradients(d, [block for member in by_block for block in member])
            if need_x and apart:
                mine = _picked(gh, factors.ranks, apart, 1), _picked(factors.down, factors.ranks, apart, 0)
                to_x.append((*mine, mask))

        dx = None
        for i, g in live if need_x else ():
            weight = self.weight(i, merges[i])
            if weight is not None and dx is not None:
                dx.addmm_(g, weight)
            elif weight is not None:
                dx = torch.mm(g, weight, out=flat) if scratch and flat is not None else g @ weight
        if need_x and dx is None:
            dx = like.new_zeros(len(like), self.blocks[0][0][0].down.shape[1])
        if dx is not None:
            for gh, down, mask in to_x:
                add_dropped_product_(dx, gh, down, mask)

        flat_out = [d for own in out for term in own for block in term for d in block]
        return dx, [*d_weights, *d_biases, *([None] * terms), *flat_out]


def _picked(joined: Tensor, ranks: Sequence[int], places: Sequence[int], dim: int) -> Tensor:
    """What of `joined`, the members' ranks side by side, belongs to the members at `places`."""
    if len(places) == len(ranks):
        return joined
    parts = joined.split(list(ranks), dim)
    return _stacked([parts[k] for k in places], dim)


def _side_by_side(parts: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """N × r of each member, joined, the scale multiplied in place: into these few numbers, not into N × in."""
    if len(set(scales)) == 1:
        return _stacked(parts, 1).mul_(scales[0])
    return _stacked([part.mul_(s) for part, s in zip(parts, scales, strict=True)], 1)


def _into(x: Tensor, down: Tensor) -> Tensor:
    """x downᵀ, N × R."""
    return x @ down.T if down.is_floating_point() else x.index_select(1, down)


def _back_into(g: Tensor, up: Tensor) -> Tensor:
    """g up, N × R."""
    return g @ up if up.is_floating_point() else g.index_select(1, up)


def _add_out_of_(y: Tensor, h: Tensor, up: Tensor, scale: float) -> None:
    """y += h upᵀ · scale in place: no pass over N × out for the scale, nor for a gate, which is in `up`."""
    if up.is_floating_point():
        y.addmm_(h, up.T, alpha=scale)
    else:
        y.index_add_(1, up, h, alpha=scale)


def _down_gradients(d: Tensor, blocks: Sequence[tuple[Block, Block, list]]) -> None:
    """The gradients of every `down` of one term, out of theirs one above the other (ΣR × in), into each block's list."""
    downs = [block.down for block, _, _ in blocks]
    for part, (block, want, into) in zip(d.split([len(down) for down in downs]), blocks, strict=True):
        into[0] = part.to(block.down.dtype) if want.down else None


def _up_gradients(
    cross: Tensor, blocks: Sequence[Block], needed: Sequence[Block], scales: Sequence[float], inv_keep: float, out: list
) -> None:
    """The gradients of every `up` and gate of one term, out of gᵀh (out × r of all its blocks), into `out`."""
    parts = cross.split([len(block.down) for block in blocks], 1)
    for block, want, s, mine, into in zip(blocks, needed, scales, parts, out, strict=True):
        c, b, gate = s * inv_keep, block.up, block.gate
        if want.up:
            # laid out as `up` is: DDP's buckets mind the strides, and at rank 1 autograd does not mend them
            into[1] = torch.mul(mine, c if gate is None else gate * c, out=torch.empty_like(b))
        if want.gate and gate is not None:
            into[2] = (mine * b.to(mine.dtype)).sum(0, dtype=gate.dtype) * c


def _stacked(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _joined(terms: Sequence[Sequence[Block]], scales: Sequence[Sequence[float]], dtype: torch.dtype) -> Joined:
    """The blocks of each member's term joined, gates multiplied (in their own float32) into `up`."""
    left = [own[0] if len(set(own)) == 1 else 1.0 for own in scales]
    blocks = [block for term in terms for block in term]
    down = _places([block.down_index for block in blocks])
    if down is None:
        down = _stacked([block.down for block in blocks]).to(dtype)
    ups: list[Tensor] = []
    for term, own, scale in zip(terms, scales, left, strict=True):
        plain = len(set(own)) == 1 and all(block.gate is None for block in term)
        up = _places([block.up_index for block in term]) if plain else None
        if up is None:
            ratios = [s / scale if scale else 1.0 for s in own]
            up = _stacked([_scaled(b.up, b.gate, c) for b, c in zip(term, ratios, strict=True)], 1).to(dtype)
        ups.append(up)
    return Joined(down, ups, left, [sum(len(block.down) for block in term) for term in terms])


def _places(indices: Sequence[Tensor | None]) -> Tensor | None:
    """The places that factors select, one after the other, if they all do."""
    found = [index for index in indices if index is not None]
    return _stacked(found) if len(found) == len(indices) else None


def _scaled(up: Tensor, gate: Tensor | None, c: float) -> Tensor:
    if gate is not None:
        return up * (gate * c if c != 1.0 else gate)
    return up * c if c != 1.0 else up
