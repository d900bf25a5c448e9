"""Intrinsic dimension of a cloud of points by its two nearest neighbours (TwoNN).

Paper: Facco, d'Errico, Rodriguez, Laio, "Estimating the intrinsic dimension of datasets by a minimal neighborhood
information", Scientific Reports 7 (2017). With r₁, r₂ the distances from a point to its nearest two and μ = r₂/r₁,
F(μ) = 1 − μ^−d; d is the slope through the origin of −ln(1−F) against ln μ, the largest μ left out.

From scikit-dimension: F_j = j/N with the full N, and the maximum likelihood (N−1)/Σ ln μ over all points.
OUR INTERPRETATION: points closer than float32 can tell apart are one point; a cloud with no dimension to speak of (fewer
than three distinct points, or all ratios 1) has d = 0; the spread is over random halves, whose standard deviation estimates
the standard error of an estimate from all points (the delete-half jackknife).

TwoNN underestimates large dimensions: a 20-dimensional cube measures about 16 at N = 1000.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rankfold.errors import RankfoldError

Fit = Literal["linear", "mle"]
DISCARD = 0.1


def two_nn(points: Tensor, fit: Fit = "linear", discard: float = DISCARD) -> float:
    """The intrinsic dimension of `points` (N × D); exact and near duplicates are dropped.

    Args:
        fit: "linear" (the paper's), or "mle".
        discard: share of the largest ratios μ that the linear fit leaves out.

    Raises:
        ValueError: not a matrix, not finite, or an argument out of its range.
    """
    table = distances(points)
    keep = distinct(points, table)
    return from_distances(table[keep][:, keep], fit, discard)


def two_nn_of(points: Tensor, samples: list[Tensor], fit: Fit = "linear", discard: float = DISCARD) -> list[float]:
    """The dimension of each subsample (index vectors into `points`); duplicates are dropped first, distances made once."""
    table = distances(points)
    keep = distinct(points, table)
    kept = [sample[keep[sample]] for sample in samples]
    return [from_distances(table[sample][:, sample], fit, discard) for sample in kept]


def random_halves(n: int, count: int, seed: int) -> list[Tensor]:
    """`count` random halves of n points, each sorted.

    Raises:
        ValueError: fewer than three, which shows no spread.
    """
    if count < 3:
        raise RankfoldError(f"subsamples={count} is too few to show a spread; give 3 or more")
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(n, generator=generator)[: (n + 1) // 2].sort().values for _ in range(count)]


def distances(points: Tensor) -> Tensor:
    """All distances (N × N) in float64, from differences: the product form |x|² + |y|² − 2xy cancels where points are close."""
    if points.ndim != 2:
        raise RankfoldError(f"points: shape {tuple(points.shape)} is not N × D; give one row per point")
    if not torch.isfinite(points).all():
        raise RankfoldError("points: NaN or infinity among them; look for a layer that overflows, or use float32")
    wide = points.detach().to("cpu", torch.float64)
    return torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist")


def distinct(points: Tensor, table: Tensor) -> Tensor:
    """The points (bool N) that are not duplicates of an earlier one: further away than rounding of their type, or of
    float32 where that is coarser, at the size that the points have."""
    eps = torch.finfo(torch.float32).eps if points.dtype != torch.float64 else torch.finfo(torch.float64).eps
    largest = points.detach().to("cpu", torch.float64).norm(dim=1).max() if len(points) else torch.tensor(0.0)
    close = table <= 8 * eps * largest
    return ~close.tril(-1).any(1)


def from_distances(table: Tensor, fit: Fit = "linear", discard: float = DISCARD) -> float:
    """TwoNN of points that are all distinct, from their distances (N × N)."""
    if fit not in ("linear", "mle"):
        raise RankfoldError(f'fit={fit!r} must be "linear" or "mle"')
    if not 0 < discard < 1:
        raise RankfoldError(
            f"discard={discard!r} must be between 0 and 1: the largest ratio has F = 1, and ln(1−F) no value"
        )
    n = len(table)
    if n < 3:
        return 0.0
    r1, r2 = table.clone().fill_diagonal_(torch.inf).topk(2, dim=1, largest=False).values.unbind(1)
    x = (r2 / r1).log().sort().values
    if not x.any():
        return 0.0
    if fit == "mle":
        return float((n - 1) / x.sum())
    x = x[: min(int((1 - discard) * n), n - 1)]
    y = -torch.log1p(-torch.arange(1, len(x) + 1, dtype=torch.float64) / n)
    square = x @ x
    return float(x @ y / square) if square > 0 else 0.0
