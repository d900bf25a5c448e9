"""y = x Wᵀ + b + Σ ((drop(x) downᵀ) ⊙ gate · scale) upᵀ, forward and backward: the only hand-written autograd here.

What it does that a chain of modules does not (measurements in docs/performance.md):

* x is saved once, as the tensor its producer and its sibling layers already hold (where autocast must cast it, as the one
  copy that all siblings share), and not at all where every `down` is frozen;
* siblings – q, k and v – are one node: one down-projection, one mask, one pass over the input's gradient (siblings.py);
* gate and scale go onto the small factor; no pass over an N×out tensor is spent on them;
* the r-wide product h is kept (N·r elements), so the backward needs no second look at x·downᵀ; not that of a term whose `up` and
  gate are frozen;
* for many tokens in float32, W + ΔW is made once per pass instead, and multiplied by (`FusedPass.merges`);
* both sums run in place in the GEMM that makes them (`addmm_`), into the base's output and into its input gradient;
* a frozen factor that only selects columns is a gather and a scatter (`Factors.down_index`);
* dropout costs what it drops (dropout.py).

Factors are cast to the dtype of x (or autocast's), never x to theirs; their gradients are cast back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rankfold.kernel.dropout import add_dropped_columns_, add_dropped_product_, drop_mask, dropped
from rankfold.kernel.factors import Factors
from rankfold.kernel.matmul import add_product_, linear, product
from rankfold.kernel.scratch import Scratch, buffer, scratch_for


class Term(NamedTuple):
    """What one adapter adds: the sum of its blocks' updates, all reading the same (dropped) input.

    Args:
        own_mask: the mask is for this layer alone, not for its siblings.
    """

    blocks: Sequence[Factors]
    dropout: float = 0.0
    own_mask: bool = False


_transforms: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]  (torch has no public name for it)


class _Order(threading.local):
    separate = False


#: Per thread, and no context variable, which a compiler cannot read.
_ORDER = _Order()


@contextmanager
def separate_order() -> Iterator[None]:
    """Inside, sums run in PEFT's order, base(x) + up(down(drop(x)))·scale, op by op: bit-equal to PEFT's LoRA in
    float32, and slower. The fused order differs from it by rounding only. Other threads are not affected."""
    before, _ORDER.separate = _ORDER.separate, True
    try:
        yield
    finally:
        _ORDER.separate = before


def in_separate_order() -> bool:
    """Whether sums run op by op: where `separate_order` says so, and under torch.func's transforms, which need plain operations."""
    return _ORDER.separate or (not torch.compiler.is_compiling() and _transforms.peek_interpreter_stack() is not None)


class Member(NamedTuple):
    """One of several linear layers that share an input.

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
        members: alike in the number of their terms and in each one's dropout; terms at the same index share a mask.

    Returns:
        For each member … × out, as `low_rank_linear`.
    """
    if in_separate_order():
        return tuple(_separate(F.linear(x, m.weight, m.bias), x, m.terms) for m in members)  # pyright: ignore
    return _apply(*to_compute_dtype(x, members))


def low_rank_update(y: Tensor, x: Tensor, terms: Sequence[Term]) -> Tensor:
    """y + Σ update(x): for a base that must compute its own output (quantised, hooked, sharded).

    Args:
        y: … × out, the base's output.
        x: … × in, its input.
        terms: one per active adapter.
    """
    if in_separate_order():
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


def _separate(y: Tensor, x: Tensor, terms: Sequence[Term]) -> Tensor:
    for term in terms:
        if not term.blocks:
            continue
        dropped = F.dropout(x.to(term.blocks[0].down.dtype), term.dropout)  # once: the blocks of a term share it
        for f in term.blocks:
            h = F.linear(dropped.to(f.down.dtype), f.down)
            h = h if f.gate is None else (h * f.gate).to(f.up.dtype)  # a gate is float32, whatever its factors are
            y = (y + F.linear(h, f.up) * f.scale).to(y.dtype)
    return y


def _apply(x: Tensor, members: Sequence[Member]) -> tuple[Tensor, ...]:
    layout, tensors = flatten_for_autograd(x, members)
    return _LowRankLinears.apply(x, layout, *tensors)  # pyright: ignore[reportReturnType]


# What autograd takes: a static layout and a flat list of tensors ---------------------------------------------------------


class FactorSlots(NamedTuple):
    """One `Factors` of a fused pass: the index of each of its tensors in the flat list, its rank and its scale."""

    down: int
    up: int
    gate: int
    down_index: int
    up_index: int
    rank: int
    scale: float


class Layout(NamedTuple):
    """Everything about one fused call except its tensors.

    The flat list holds their weights, their biases, a mask per term, and five tensors per `Factors`.

    Args:
        members: how many.
        inv_keeps: 1/(1 − p) of each term.
        slots: [term][member], each a sequence.
        ranks: [term][member], summed over the blocks.
    """

    members: int
    inv_keeps: tuple[float, ...]
    slots: tuple[tuple[tuple[FactorSlots, ...], ...], ...]
    ranks: tuple[tuple[int, ...], ...]

    def bias(self, member: int) -> int:
        """The index of a member's bias; that of its weight is `member` itself."""
        return self.members + member

    def masks(self) -> slice:
        return slice(2 * self.members, 2 * self.members + len(self.ranks))


def flatten_for_autograd(x: Tensor, members: Sequence[Member]) -> tuple[Layout, list[Tensor | None]]:
    """Flattens one fused call for autograd.Function: a static layout and a flat list of tensors. Dropout masks are drawn here.

    Args:
        x: … × in, what all members read.
    """
    terms = list(zip(*[[t for t in m.terms if t.blocks] for m in members], strict=True))
    tensors: list[Tensor | None] = [m.weight for m in members]
    tensors += [m.bias for m in members]
    inv_keeps, slots, ranks = [], [], []
    for first, *_ in terms:
        mask, keep = drop_mask(x, first.dropout)
        tensors.append(mask)
        inv_keeps.append(1.0 / keep if keep else 0.0)
    for term in terms:
        slots.append([])
        for own in term:
            slots[-1].append([])
            for f in own.blocks:  # one of rank 0 too: DDP waits for its (empty) gradients
                at = len(tensors)
                slots[-1][-1].append(FactorSlots(at, at + 1, at + 2, at + 3, at + 4, f.rank, f.scale))
                tensors += (f.down, f.up, f.gate, f.down_index, f.up_index)
        ranks.append(tuple([sum([block.rank for block in own]) for own in slots[-1]]))
    frozen = tuple([tuple([tuple(own) for own in term]) for term in slots])
    return Layout(len(members), tuple(inv_keeps), frozen, tuple(ranks)), tensors


class _LowRankLinears(torch.autograd.Function):
    """One node for all members i that read x, with terms t (adapters) of blocks (D, γ, U, s).

    Shapes: x N×in, W_i and ΔW out×in, y_i and g_i N×out, D r×in, γ r, U out×r, h and gh N×R, with R the ranks of one term side
    by side; x̃ is x with the term's mask, c = s/(1 − p).

        y_i  = x W_iᵀ + b_i + Σ_t c (h ⊙ γ) Uᵀ        h = x̃ Dᵀ

    With g_i = ∂L/∂y_i, and M = hᵀ g_i (r×out) made once for both dU and dγ:

        dU   = c Mᵀ ⊙ γ                               (out×r)
        dγ   = c Σ_out M ⊙ Uᵀ                         (r)
        gh   = c g_i (U ⊙ γ)                          (N×r)
        dD   = ghᵀ x̃                                  (r×in)
        dx   = Σ_i g_i W_i + Σ_t mask_t ⊙ (gh D)      (N×in)
        dW_i = g_iᵀ x,   db_i = Σ_N g_i               where they are trained

    The blocks of a term are joined for the products and split afterwards, however many blocks and members: one product
    makes h, one the gradient of every D, one what goes back to x. The joined copies are of factors, not of
    activations, and are made again in the backward rather than kept.
    """

    @staticmethod
    def forward(ctx, x, layout, *tensors):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.scratch = scratch_for(x)
        fused = FusedPass(layout, tensors)
        with no_autocast([x]):
            outputs, hidden = fused.forward(x.reshape(-1, x.shape[-1]), ctx.scratch)
        ctx.layout, ctx.shape = layout, x.shape
        ctx.set_materialize_grads(False)  # one of the members may be left unused
        ctx.save_for_backward(x if fused.reads_input else None, *fused.kept_hidden(hidden), *fused.kept)
        return tuple([restore_shape(y, x.shape) for y in outputs])

    @staticmethod
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        with no_autocast(grads):
            x, *saved = ctx.saved_tensors
            terms = len(ctx.layout.inv_keeps)
            need_x, _, *needed = ctx.needs_input_grad
            fused = FusedPass(ctx.layout, saved[terms:])
            if is_differentiated_again():
                dx, others = fused.differentiable_backward(x, grads, need_x, needed)
                return dx, None, *others
            flat = None if x is None else x.reshape(-1, x.shape[-1])
            scratch = None if flat is None else scratch_for(flat)
            dx, others = fused.backward(flat, saved[:terms], grads, need_x, needed, scratch)
            ctx.scratch = None  # who keeps an output keeps its node, but need not keep this
            return None if dx is None else dx.view(ctx.shape), None, *others


def restore_shape(y: Tensor, like: Sequence[int]) -> Tensor:
    """N × out as … × out: as a tensor of its own, since autograd forbids writing in place to a view that a Function returns."""
    return y if len(like) == 2 else torch.ops.aten._unsafe_view(y, (*like[:-1], y.shape[-1]))


def no_autocast(tensors: Sequence[Tensor | None]) -> AbstractContextManager:
    """Turns autocast off for code whose dtypes are already decided."""
    t = next((t for t in tensors if t is not None), None)
    return nullcontext() if t is None or not _autocasts(t) else torch.autocast(t.device.type, enabled=False)


def is_differentiated_again() -> bool:
    """Whether a backward runs with `create_graph=True`: its gradients must then be differentiable themselves."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


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
