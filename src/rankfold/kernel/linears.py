"""y = x Wᵀ + b + Σ ((drop(x) downᵀ) ⊙ gate · scale) upᵀ, forward and backward: the only hand-written autograd here.

What it does that a chain of modules does not (measurements in docs/performance.md):

* x is saved once, as the tensor its producer and its sibling layers already hold (where autocast must cast it, as the one
  copy that all siblings share), and not at all where every `down` is frozen;
* siblings – q, k and v – are one node: one down-projection, one mask, one pass over the input's gradient (host/siblings.py);
* the r-wide product h is kept (N·r elements), so the backward needs no second look at x·downᵀ; not that of a term whose `up` and
  gate are frozen;
* products, sums and scales run as fused_pass.py says;
* dropout costs what it drops (dropout.py).

Factors are cast to the dtype of x (or autocast's), never x to theirs; their gradients are cast back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankfold.kernel.fused_pass import FusedPass
from rankfold.kernel.layout import Member, Term, flatten_for_autograd
from rankfold.kernel.scratch import scratch_for

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
