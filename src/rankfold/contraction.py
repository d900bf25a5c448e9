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
    layout: list[tuple[float, tuple[float, ...]]] = []  # one a term: 1/(1−p), and its blocks' scales
    tensors: list[Tensor | None] = []
    for term in terms:
        if not term.blocks:
            continue
        keep = 1.0 - term.dropout
        mask = None
        if term.dropout > 0.0:
            mask = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(keep)
        masks.append(mask)
        layout.append((1.0 / keep if keep else 0.0, tuple(f.scale for f in term.blocks)))
        for f in term.blocks:  # a rank-0 block too: DDP waits for its (empty) gradients
            tensors += [f.down, f.up, f.gate]
    y: Tensor = _LowRankLinear.apply(x, weight, bias, tuple(layout), *masks, *tensors)  # pyright: ignore[reportAssignmentType]
    # out here, since autograd forbids writing in place to a view that a Function returns
    return y.view(*x.shape[:-1], y.shape[-1])


class _LowRankLinear(torch.autograd.Function):
    """See the module's docstring. Shapes inside: x N×in, y and g N×out, h and gh N×r, r the rank of a whole term.

    The blocks of a term are joined for the products and split afterwards: six products a layer, however many blocks. The
    joined copies are of factors, not of activations, and are made again in the backward rather than kept.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, layout, *rest):  # pyright: ignore[reportIncompatibleMethodOverride]
        masks, blocks = _sorted(layout, rest)
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, weight, bias) if weight is not None else flat.new_zeros(len(flat), blocks[0][0][1].shape[0])
        hidden = []
        for (inv_keep, scales), mask, term in zip(layout, masks, blocks, strict=True):
            down, up, scale = _joined(term, scales, x.dtype)
            h = _dropped(flat, mask) @ down.T
            y.addmm_(h, up.T, alpha=scale * inv_keep)  # folds the scale in; a gate is in `up` already
            hidden.append(h)
        ctx.layout = layout
        ctx.save_for_backward(x, weight, *hidden, *rest)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        if not _autocasts(g):
            return _backward(ctx, g)
        with torch.autocast(g.device.type, enabled=False):  # the forward has settled the dtypes
            return _backward(ctx, g)


Block = tuple[Tensor, Tensor, Tensor | None]  # down, up, gate


def _backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *saved = ctx.saved_tensors
    terms = len(ctx.layout)
    hidden, rest = saved[:terms], saved[terms:]
    masks, blocks = _sorted(ctx.layout, rest)
    need_x, need_weight, need_bias, _, *need = ctx.needs_input_grad
    needed = iter(need[terms:])
    flat, g = x.reshape(-1, x.shape[-1]), g.to(x.dtype)

    dx = None
    if need_x:
        dx = g @ weight if weight is not None else torch.zeros_like(flat)
    grads: list[Tensor | None] = []
    for (inv_keep, scales), mask, term, h in zip(ctx.layout, masks, blocks, hidden, strict=True):
        wants = [(next(needed), next(needed), next(needed)) for _ in term]  # down, up, gate of each block
        down, up, scale = _joined(term, scales, x.dtype)
        # as (hᵀg)ᵀ, the faster order in the prototype that preceded this file (shared/performance.md §3)
        cross = (h.T @ g).T if any(w[1] or w[2] for w in wants) else None  # out×r
        d_down = None
        if need_x or any(w[0] for w in wants):
            gh = g @ up
            if any(w[0] for w in wants):
                d_down = (gh.T @ _dropped(flat, mask)).mul_(scale * inv_keep)
            if dx is not None and mask is None:
                dx.addmm_(gh, down, alpha=scale)
            elif dx is not None and mask is not None:
                dx.addcmul_(gh @ down, mask.view_as(flat).to(x.dtype), value=scale * inv_keep)
        at = 0
        for (a, b, gate), (want_down, want_up, want_gate), s in zip(term, wants, scales, strict=True):
            part, at, c = slice(at, at + len(a)), at + len(a), s * inv_keep
            grads.append(d_down[part].to(a.dtype) if want_down and d_down is not None else None)
            mine = None if cross is None else cross[:, part]
            # laid out as `up` is: DDP's buckets mind the strides, and at rank 1 autograd does not mend them
            grads.append(None if mine is None or not want_up else torch.empty_like(b).copy_(_scaled(mine, gate, c)))
            if want_gate and mine is not None and gate is not None:
                grads.append((mine * b.to(mine.dtype)).sum(0, dtype=gate.dtype) * c)
            else:
                grads.append(None)
    d_weight = g.T @ flat if need_weight else None
    d_bias = g.sum(0) if need_bias else None
    dx = None if dx is None else dx.view_as(x)
    return dx, d_weight, d_bias, None, *([None] * terms), *grads


def _sorted(layout: Sequence, rest: Sequence) -> tuple[Sequence[Tensor | None], list[list[Block]]]:
    """One mask and the blocks of each term, out of the flat arguments that autograd wants."""
    tensors = iter(rest[len(layout) :])
    return rest[: len(layout)], [[(next(tensors), next(tensors), next(tensors)) for _ in s] for _, s in layout]


def _joined(term: Sequence[Block], scales: Sequence[float], dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """down r×in, up · diag(gate) out×r, both in `dtype` (gates multiply in their own float32), and the scale left over."""
    scale = scales[0] if len(set(scales)) == 1 else 1.0
    downs = [down.to(dtype) for down, _, _ in term]
    ups = [
        _scaled(up, gate, s / scale if scale else 1.0).to(dtype) for (_, up, gate), s in zip(term, scales, strict=True)
    ]
    return (downs[0], ups[0], scale) if len(term) == 1 else (torch.cat(downs), torch.cat(ups, 1), scale)


def _scaled(up: Tensor, gate: Tensor | None, c: float) -> Tensor:
    if gate is not None:
        return up * (gate * c if c != 1.0 else gate)
    return up * c if c != 1.0 else up


def _dropped(flat: Tensor, mask: Tensor | None) -> Tensor:
    return flat if mask is None else flat * mask.view_as(flat)
