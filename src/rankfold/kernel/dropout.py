"""Dropout whose cost scales with p: a list of dropped indices for small p, else one byte per element.

    mask, keep = drop_mask(x, 0.05)
    h = dropped(x, mask) @ down.T / keep

`F.dropout` draws one random number per element, which on a CPU costs more than the layer it drops. Where few elements go, only
the gaps between them are drawn (the geometric distribution), and only their indices are kept: 0.4 bytes per element at p = 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rankfold.kernel.matmul import add_product_, product

#: Up to here a list of indices (8 bytes each) is not longer than a mask of one byte per element.
SPARSE = 1 / 8


def drop_mask(x: Tensor, p: float) -> tuple[Tensor | None, float]:
    """Draws a dropout mask for x; returns it with the probability of keeping an element.

    Args:
        x: of any shape; p: probability of dropping an element, independently of the others.

    Returns:
        The mask: the dropped elements' indices into the flattened x (int64, sorted), or the kept elements (bool, of x's shape),
        or None if all are kept. And the probability; where the mask is drawn as one random byte per element (CUDA, or p above
        1/8), p is rounded to k/256, k ≤ 255.
    """
    if p <= 0.0:
        return None, 1.0
    k = min(round(256 * p), 255)  # at 256 nothing could be kept, and a byte cannot be compared with it
    if not torch.compiler.is_compiling():
        if x.device.type == "cpu" and p <= SPARSE:
            return _dropped_indices(x.numel(), p), 1.0 - p
        if k and x.device.type in ("cpu", "cuda"):  # elsewhere there are no 64-bit draws
            draws = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device).random_(-(2**63), None)
            return (draws.view(torch.uint8)[: x.numel()] >= k).view(x.shape), 1.0 - k / 256
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - p), 1.0 - p


def _dropped_indices(n: int, p: float) -> Tensor:
    """Which of n elements are dropped, each with probability p: the sums of gaps drawn with P(gap > g) = (1 − p)^g."""
    per_log = 1.0 / math.log1p(-p)
    dtype = (
        torch.float32 if p > 0.01 else torch.float64
    )  # a uniform float32 has steps of 6e-8: too coarse for a small p
    if not n:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    found, last = [], -1
    while last < n - 1:
        left = n - 1 - last
        gaps = torch.rand(int(left * p + 6 * math.sqrt(left * p)) + 16, dtype=dtype, device="cpu")
        indices = gaps.neg_().log1p_().mul_(per_log).to(torch.int64).add_(1).cumsum_(0).add_(last)
        found.append(indices)
        last = int(indices[-1])
    indices = found[0] if len(found) == 1 else torch.cat(found)
    # a copy, so that the draws beyond the end are not kept with it
    return indices[: int(torch.searchsorted(indices, n))].clone()


def keeps(mask: Tensor) -> bool:
    """Whether a mask says per element what is kept; else it lists the indices that are dropped."""
    return mask.dtype == torch.bool


def dropped(x: Tensor, mask: Tensor | None, out: Tensor | None = None, differentiable: bool = False) -> Tensor:
    """x with zeros where it is dropped; x itself where nothing is.

    Args:
        x: N × in, of as many elements as the mask was drawn for.
        out: N × in, contiguous, for the result; it may be x.
        differentiable: nothing is written in place, so that autograd can follow.
    """
    if mask is None:
        return x
    if differentiable:
        kept = mask.view(x.shape) if keeps(mask) else _kept(x, mask)
        return torch.where(kept, x, x.new_zeros(()))
    out = x.new_empty(x.shape) if out is None else out
    if keeps(mask):
        return torch.where(mask.view(x.shape), x, x.new_zeros(()), out=out)
    out.copy_(x).view(-1).index_fill_(0, mask, 0.0)
    return out


def _kept(x: Tensor, indices: Tensor) -> Tensor:
    kept = torch.ones(x.numel(), dtype=torch.bool, device=x.device)
    return kept.index_fill_(0, indices, False).view(x.shape)


def add_dropped_product_(out: Tensor, left: Tensor, right: Tensor, mask: Tensor | None) -> None:
    """out += dropped(left @ right), in place.

    Args:
        out: N × in, contiguous; left: N × R; right: R × in.
    """
    if mask is not None and keeps(mask):
        out.add_(dropped(product(left, right), mask))
        return
    with _put_back(out, mask):
        add_product_(out, left, right, 1.0)


def add_dropped_columns_(out: Tensor, left: Tensor, columns: Tensor, mask: Tensor | None) -> None:
    """out[:, columns] += dropped(left), in place.

    Args:
        out: N × in, contiguous; left: N × R; columns: int64, R.
    """
    if mask is not None and keeps(mask):
        kept = mask.view(out.shape).index_select(1, columns)
        out.index_add_(1, columns, torch.where(kept, left, left.new_zeros(())))
        return
    with _put_back(out, mask):
        out.index_add_(1, columns, left)


@contextmanager
def _put_back(out: Tensor, dropped_indices: Tensor | None) -> Iterator[None]:
    """Gives dropped elements their old values back: exact, and without a pass over N × in."""
    flat = out.view(-1)
    before = None if dropped_indices is None else flat.index_select(0, dropped_indices)
    yield
    if before is not None and dropped_indices is not None:
        flat.index_copy_(0, dropped_indices, before)
