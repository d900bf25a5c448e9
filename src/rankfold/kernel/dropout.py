"""Dropout whose cost is that of what it drops: which elements of the input go, as a list of places or as one byte an element.

    mask, keep = drop_mask(x, 0.05)
    h = dropped(x, mask) @ down.T / keep

`F.dropout` draws a random number an element, which on a CPU costs more than the layer it drops. Where few elements go, only the
gaps between them are drawn (the geometric distribution), and their places alone are kept: 0.4 bytes an element at p = 0.05.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankfold.kernel.matmul import add_product_, product

#: Up to here a list of places (8 bytes each) is no longer than a mask of a byte an element.
SPARSE = 1 / 8


def drop_mask(x: Tensor, p: float) -> tuple[Tensor | None, float]:
    """What dropout does to x, and the probability of keeping.

    Args:
        x: of any shape; p: probability of dropping an element, independently of the others.

    Returns:
        The places that are dropped, counted through x (int64, sorted), or what is kept (bool, of x's shape), or None where
        all is kept; and the probability. Where it is a byte of random bits an element (CUDA, or p above 1/8), p is rounded
        to k/256.
    """
    if p <= 0.0:
        return None, 1.0
    k = round(256 * p)
    if not torch.compiler.is_compiling():
        if x.device.type == "cpu" and p <= SPARSE:
            return _places(x.numel(), p), 1.0 - p
        if k and x.device.type in ("cpu", "cuda"):  # elsewhere there are no 64-bit draws
            draws = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device).random_(-(2**63), None)
            return (draws.view(torch.uint8)[: x.numel()] >= k).view(x.shape), 1.0 - k / 256
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - p), 1.0 - p


def _places(n: int, p: float) -> Tensor:
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
        places = gaps.neg_().log1p_().mul_(per_log).to(torch.int64).add_(1).cumsum_(0).add_(last)
        found.append(places)
        last = int(places[-1])
    places = found[0] if len(found) == 1 else torch.cat(found)
    # a copy, so that the draws beyond the end are not kept with it
    return places[: int(torch.searchsorted(places, n))].clone()


def dropped(x: Tensor, mask: Tensor | None, into: Tensor | None = None) -> Tensor:
    """x with zeros where it is dropped; x itself where nothing is.

    Args:
        x: N × in, of as many elements as the mask was drawn for.
        into: N × in, contiguous, for the result; it may be x.
    """
    if mask is None:
        return x
    into = x.new_empty(x.shape) if into is None else into
    if mask.dtype == torch.bool:
        return torch.where(mask.view(x.shape), x, x.new_zeros(()), out=into)
    into.copy_(x).view(-1).index_fill_(0, mask, 0.0)
    return into


def add_dropped_product_(out: Tensor, left: Tensor, right: Tensor, mask: Tensor | None) -> None:
    """out += dropped(left @ right), in place.

    Args:
        out: N × in, contiguous; left: N × R.
        right: R × in; or int64, R: the columns of `out` that left's are added to.
    """
    selects = not right.is_floating_point()
    if mask is not None and mask.dtype == torch.bool:
        if selects:
            kept = mask.view(out.shape).index_select(1, right)
            out.index_add_(1, right, torch.where(kept, left, left.new_zeros(())))
        else:
            out.add_(dropped(product(left, right), mask))
        return
    flat, before = out.view(-1), None
    if mask is not None:
        before = flat.index_select(0, mask)  # what is dropped is put back: exact, and no pass over N × in
    if selects:
        out.index_add_(1, right, left)
    else:
        add_product_(out, left, right)
    if mask is not None and before is not None:
        flat.index_copy_(0, mask, before)
