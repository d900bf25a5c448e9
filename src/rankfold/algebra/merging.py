"""Rules that keep only some entries of each update: TIES (arXiv 2306.01708) and DARE (arXiv 2311.03099), on whole updates.

They work on ΔW (out × in), as the papers do on task vectors, and not on A and B apart. The result has no low-rank form, so a
fold compresses it and states the error.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rankfold.errors import RankfoldError
from rankfold.fold.source import Update
from rankfold.kernel.factors import Factors

#: Of a module's name and its weighted updates.
Rule = Callable[[str, Sequence[tuple[float, Update]]], Tensor]
RULES = ("sum", "ties", "dare_linear", "dare_ties")


def rule(name: str, density: float | None, seed: int = 0) -> Rule | None:
    """The rule of this name; None for "sum", which needs none.

    Raises:
        RankfoldError: an unknown name, or a density that is missing, out of (0, 1] or of no use.
    """
    if name not in RULES:
        raise RankfoldError(f"combination={name!r} must be one of {', '.join(RULES)}")
    if name == "sum":
        if density is not None:
            raise RankfoldError(f"density={density} is of ties and dare; combination='sum' keeps every entry")
        return None
    if density is None or not 0 < density <= 1:
        raise RankfoldError(f"density={density} must be in (0, 1] for combination={name!r}, for instance 0.2")

    def apply(module: str, terms: Sequence[tuple[float, Update]]) -> Tensor:
        dense = [u.delta() if isinstance(u, Factors) else u for _, u in terms]
        if name == "ties":
            kept = [largest(d, density) for d in dense]
        else:
            chance = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{module}".encode()))
            kept = [dropped(d, density, chance) for d in dense]
        weighed = torch.stack([w * d for (w, _), d in zip(terms, kept, strict=True)])
        return weighed.sum(0) if name == "dare_linear" else agreed_mean(weighed)

    return apply


def largest(delta: Tensor, density: float) -> Tensor:
    """The share `density` of the entries that is largest by absolute value; the others 0."""
    keep = max(1, round(density * delta.numel()))
    least = delta.abs().flatten().kthvalue(delta.numel() - keep + 1).values
    return delta.where(delta.abs() >= least, 0.0)


def dropped(delta: Tensor, density: float, chance: torch.Generator) -> Tensor:
    """Each entry kept with probability `density` and divided by it, so that the expected value stays."""
    keep = torch.rand(delta.shape, dtype=delta.dtype, generator=chance) < density
    return (delta / density).where(keep, 0.0)


def agreed_mean(weighed: Tensor) -> Tensor:
    """Per entry, the mean of those (first dimension) that have the sign of their sum."""
    agree = (weighed.sign() == weighed.sum(0).sign()) & (weighed != 0)
    return (weighed * agree).sum(0) / agree.sum(0).clamp(min=1)
