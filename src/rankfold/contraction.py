"""y = x Wᵀ + b + Σ ((drop(x) downᵀ) ⊙ gate · scale) upᵀ, forward and backward: the only hand-written autograd here.

What it does that a chain of modules does not (numbers in docs/performance.md):

* x is saved once, as the tensor its producer and its sibling layers already hold (where autocast must cast it, each layer
  holds the copy that its own base product needs anyway);
* gate and scale go onto the small factor; no pass over an N×out tensor is spent on them;
* the r-wide product h is kept (N·r numbers), so the backward needs no second look at x·downᵀ;
* both sums run in place in the GEMM that makes them (`addmm_`), into the base's output and into its input gradient;
* a dropout mask is one byte an element.

Factors are cast to the dtype of x (or autocast's), never x to theirs; their gradients are cast back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankfold.factors import Factors


@dataclass(frozen=True)
class Term:
    """What one adapter adds: the sum of its blocks' updates, all reading the same (dropped) input."""

    blocks: Sequence[Factors]
    dropout: float = 0.0


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
    if _order == "separate":
        return _separate(F.linear(x, weight, bias), x, terms)
    dtype = _compute_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    return _apply(x.to(dtype), weight.to(dtype), bias, terms)


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
    return y + _apply(x.to(_compute_dtype(x)), None, None, terms).to(y.dtype)


def _autocasts(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # there is none on "meta"


def _compute_dtype(x: Tensor) -> torch.dtype:
    if _autocasts(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


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


def _apply(x: Tensor, weight: Tensor | None, bias: Tensor | None, terms: Sequence[Term]) -> Tensor:
    masks: list[Tensor | None] = []
    layout: list[tuple[int, float, float]] = []  # one a block: which mask, 1/(1−p), scale
    tensors: list[Tensor | None] = []
    for term in terms:
        keep = 1.0 - term.dropout
        mask = None
        if term.dropout > 0.0:
            mask = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(keep)
        for f in term.blocks:  # a rank-0 block too: DDP waits for its (empty) gradients
            layout.append((len(masks), 1.0 / keep if keep else 0.0, f.scale))
            tensors += [f.down, f.up, f.gate]
        masks.append(mask)
    y: Tensor = _LowRankLinear.apply(x, weight, bias, tuple(layout), *masks, *tensors)  # pyright: ignore[reportAssignmentType]
    # out here, since autograd forbids writing in place to a view that a Function returns
    return y.view(*x.shape[:-1], y.shape[-1])


class _LowRankLinear(torch.autograd.Function):
    """See the module's docstring. Shapes inside: x N×in, y and g N×out, h and gh N×r."""

    @staticmethod
    def forward(ctx, x, weight, bias, layout, *rest):  # pyright: ignore[reportIncompatibleMethodOverride]
        n_masks = len(rest) - 3 * len(layout)
        masks, tensors = rest[:n_masks], rest[n_masks:]
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, weight, bias) if weight is not None else flat.new_zeros(len(flat), tensors[1].shape[0])
        hidden = []
        for (which, inv_keep, scale), (down, up, gate) in zip(layout, _triples(tensors), strict=True):
            mask = masks[which]
            dropped = flat if mask is None else flat * mask.view_as(flat)
            h = dropped @ down.to(x.dtype).T
            # addmm_ folds scale in; a gate is folded into the out×r factor
            y.addmm_(h, _weighted(up, gate, x.dtype).T, alpha=scale * inv_keep)
            hidden.append(h)
        ctx.layout, ctx.n_masks, ctx.has_bias = layout, n_masks, bias is not None
        ctx.save_for_backward(x, weight, *hidden, *rest)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        if not _autocasts(g):
            return _backward(ctx, g)
        with torch.autocast(g.device.type, enabled=False):  # the forward has settled the dtypes
            return _backward(ctx, g)


def _backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *saved = ctx.saved_tensors
    n = len(ctx.layout)
    hidden, rest = saved[:n], saved[n:]
    masks, tensors = rest[: ctx.n_masks], rest[ctx.n_masks :]
    need_x, need_weight, need_bias, _, *need = ctx.needs_input_grad
    need = need[ctx.n_masks :]
    flat, g = x.reshape(-1, x.shape[-1]), g.to(x.dtype)

    dx = None
    if need_x:
        dx = g @ weight if weight is not None else torch.zeros_like(flat)
    grads: list[Tensor | None] = []
    for k, ((which, inv_keep, scale), (down, up, gate)) in enumerate(zip(ctx.layout, _triples(tensors), strict=True)):
        need_down, need_up, need_gate = need[3 * k : 3 * k + 3]
        mask, h, c = masks[which], hidden[k], scale * inv_keep
        d_down = d_up = d_gate = None
        if need_up or need_gate:
            cross = (h.T @ g).T  # out×r; this order is faster than gᵀh (shared/performance.md §3)
            if gate is not None and need_gate:
                d_gate = (cross * up.to(cross.dtype)).sum(0, dtype=gate.dtype) * c
            if need_up:
                d_up = (cross * c if gate is None else cross * (gate * c).to(cross.dtype)).to(up.dtype)
        if need_x or need_down:
            gh = g @ _weighted(up, gate, x.dtype)
            if need_down:
                dropped = flat if mask is None else flat * mask.view_as(flat)
                d_down = (gh.T @ dropped).mul_(c).to(down.dtype)
            if dx is not None:
                if mask is None:
                    dx.addmm_(gh, down.to(x.dtype), alpha=c)
                else:
                    dx.addcmul_(gh @ down.to(x.dtype), mask.view_as(flat).to(x.dtype), value=c)
        grads += [d_down, d_up, d_gate]
    d_weight = g.T @ flat if need_weight else None
    d_bias = g.sum(0) if need_bias else None
    dx = None if dx is None else dx.view_as(x)
    return dx, d_weight, d_bias, None, *([None] * ctx.n_masks), *grads


def _triples(tensors: Sequence) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    it = iter(tensors)
    return zip(it, it, it, strict=True)


def _weighted(up: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    """up · diag(gate) in `dtype`, multiplied in the gate's own (float32) precision."""
    return up.to(dtype) if gate is None else (up * gate).to(dtype)
