"""r×r algebra, batched over a stack of pairs. In float64, whatever the factors are in (float32 on devices that lack it)."""

from __future__ import annotations

import torch
from torch import Tensor

#: Eigenvalues up to this are zero, whatever the largest is: 1/√ of less would send the other factor to infinity in one step.
TINY = 1e-24
#: Elements that `precise_gram` widens at once, so that they stay in the cache.
CHUNK = 2**18


def widest(t: Tensor) -> torch.dtype:
    """The type of r×r algebra on the device of `t`."""
    return torch.float32 if t.device.type == "mps" else torch.float64


def gram(rows: Tensor) -> tuple[Tensor, float]:
    """rows · rowsᵀ of L × r × n, summed in the type of `rows`; and the share of its largest eigenvalue that is rounding."""
    return (rows @ rows.mT).to(widest(rows)), rows.shape[1] * torch.finfo(rows.dtype).eps


def precise_gram(rows: Tensor) -> tuple[Tensor, float]:
    """As `gram`, summed in the widest type: roots of its eigenvalues are as good as the singular values of a float32 QR."""
    wide, r = widest(rows), rows.shape[1]
    several = max(CHUNK // max(rows[0].numel(), 1), 1)
    parts = [part @ part.mT for part in (some.to(wide) for some in rows.split(several))]
    eps = torch.finfo(rows.dtype).eps
    return torch.cat(parts), max((r * eps) ** 2, r * torch.finfo(wide).eps)


def eigh(s: Tensor, rounding: float) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (ascending, never negative) and eigenvectors of symmetric matrices, and which eigenvalues are more than `TINY`
    and `rounding` times the largest: none where the matrix is zero."""
    values, vectors = torch.linalg.eigh(s)
    values = values.clamp_min(0)
    return values, vectors, values > (rounding * values[..., -1:]).clamp_min(TINY)


def function(values: Tensor, vectors: Tensor) -> Tensor:
    """vectors · diag(values) · vectorsᵀ."""
    return (vectors * values.unsqueeze(-2)) @ vectors.mT


def inverse(s: Tensor, rounding: float, ridge: float) -> Tensor:
    """(s + ridge·I)⁺ of symmetric matrices; directions in the null space of `s` are left out."""
    values, vectors, real = eigh(s, rounding)
    return function(torch.where(real, 1 / (values + ridge), 0), vectors)


def inverse_root(s: Tensor, rounding: float) -> Tensor:
    """s^(−1/2) of symmetric matrices; directions in the null space of `s` are left out."""
    values, vectors, real = eigh(s, rounding)
    return function(torch.where(real, values.rsqrt(), 0), vectors)


def sylvester(b: tuple[Tensor, Tensor], a: tuple[Tensor, Tensor], c: Tensor, floor: float = 1e-12) -> Tensor:
    """X of S_B·X + X·S_A = C, from the eigenvalues and eigenvectors of S_B and S_A; 0 where both eigenvalues are ~0."""
    (p, u), (q, v) = b, a
    total = p.unsqueeze(-1) + q.unsqueeze(-2)
    solved = torch.where(total > floor, (u.mT @ c @ v) / total.clamp_min(floor), 0)
    return u @ solved @ v.mT
