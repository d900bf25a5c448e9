"""Fewer components: the best approximation of an update at a rank or within an error, plain or for the inputs it will see.

    min ‖ΔW − Δ̂‖_F            plain
    min ‖(ΔW − Δ̂) C^½‖_F      with C = E[x xᵀ]: the error of the output

Both minima are U U ᵀΔW with U the leading left singular vectors of ΔW or ΔW C^½, so C is never inverted. Factors stay
factors: a QR and an r × r core. Only an update that has no factors is decomposed whole, by the Gram matrix of its smaller side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold.errors import RankfoldError
from rankfold.fold.source import Update
from rankfold.kernel.factors import Factors

#: Share of the mean input power that every direction is given, so that what the calibration never saw still counts a little.
RIDGE = 1e-4


@dataclass(frozen=True)
class CompressionLimit:
    """How far to compress.

    Args:
        rank: at most this many components a module.
        error: the fewest components that keep the relative error of a module within this.
        moments: E[x xᵀ] (in × in) by module; then `error` is that of the output.

    Raises:
        ValueError: out of range, or moments with neither.
    """

    rank: int | None = None
    error: float | None = None
    moments: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise RankfoldError(f"rank={self.rank} must be at least 1")
        if self.error is not None and not 0 <= self.error < 1:
            raise RankfoldError(f"error={self.error} is relative and must be in [0, 1), for instance 0.01")
        if self.moments is not None and not self:
            raise RankfoldError("calibration weighs what compression cuts off; give rank or error with it")

    def __bool__(self) -> bool:
        return self.rank is not None or self.error is not None

    def moment(self, module: str) -> Tensor | None:
        """The module's E[x xᵀ] in float64, with the ridge; None without calibration."""
        if self.moments is None:
            return None
        moment = self.moments[module].double()
        return moment + RIDGE * moment.trace() / len(moment) * torch.eye(len(moment), dtype=torch.float64)


def compress(update: Update, limit: CompressionLimit, moment: Tensor | None = None) -> Factors:
    """The best approximation of `update` (float64) within the limit, where `moment` (in × in) weighs the inputs."""
    if isinstance(update, Factors):
        update = update.baked()
        u, r = torch.linalg.qr(update.up)  # ΔW = u · (r · down)
        rows = r @ update.down
        if moment is None:  # by SVD: a Gram matrix would square the small singular values away
            left = torch.linalg.svd(r @ torch.linalg.qr(update.down.T).R.T, full_matrices=False).U
        else:
            left = _eigenvectors(rows @ moment @ rows.T)
        u, rows = u @ left, left.T @ rows
    else:
        out, into = update.shape
        if moment is None and out > into:
            turned = compress(update.T, limit)
            return Factors(turned.up.T, turned.down.T)
        u = _eigenvectors(update @ (update if moment is None else update @ moment).T)
        rows = u.T @ update
    power = (rows * (rows if moment is None else rows @ moment)).sum(1).clamp(min=0)
    rank = _rank_for(power, limit)
    return Factors(rows[:rank], u[:, :rank])


def weighted_error(update: Update, folded: Factors, moment: Tensor) -> float:
    """‖(ΔW − Δ̂) C^½‖_F relative to ‖ΔW C^½‖_F: the error of the output on inputs like the calibration's."""

    def power(f: Factors) -> float:
        f = f.baked()
        return float(((f.up.T @ f.up) * (f.down @ moment @ f.down.T)).sum().clamp(min=0).sqrt())

    if isinstance(update, Tensor):
        missed = update - folded.delta()
        whole = float(((update @ moment) * update).sum().sqrt())
        return float(((missed @ moment) * missed).sum().clamp(min=0).sqrt()) / (whole or 1.0)
    return power(update.minus(folded)) / (power(update) or 1.0)


def _eigenvectors(gram: Tensor) -> Tensor:
    """Of a symmetric matrix, the largest first."""
    return torch.linalg.eigh((gram + gram.T) / 2).eigenvectors.flip(1)


def _rank_for(power: Tensor, limit: CompressionLimit) -> int:
    """How many components to keep, from the squared norm of each."""
    alive = int((power > 1e-26 * power.sum()).sum())  # the others are float64's own rounding
    rank = alive if limit.rank is None else min(limit.rank, alive)
    if limit.error is None or not rank:
        return rank
    left = power.flip(0).cumsum(0).flip(0).sqrt()  # left[k]: the error of rank k
    enough = (left <= limit.error * left[0]).nonzero()
    return min(rank, int(enough[0]) if len(enough) else alive)
