"""r×r algebra, batched over a stack of pairs. In float64, whatever the factors are in (float32 on devices that lack it)."""

from __future__ import annotations

import torch
from torch import Tensor


def widest(t: Tensor) -> torch.dtype:
    """The type of r×r algebra on the device of `t`."""
    return torch.float32 if t.device.type == "mps" else torch.float64


def gram(rows: Tensor) -> Tensor:
    """rows · rowsᵀ of … × r × n, accumulated in the widest type: its eigenvalues are then as good as a QR's in float32."""
    wide = rows.to(widest(rows))
    return wide @ wide.mT


def eigh(s: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (ascending, never negative) and eigenvectors of symmetric matrices, and which eigenvalues are not rounding.

    Args:
        s: … × r × r.
        eps: machine epsilon of the factors that `s` was made of.
    """
    values, vectors = torch.linalg.eigh(s)
    values = values.clamp_min(0)
    r = s.shape[-1]
    floor = max((r * eps) ** 2, r * torch.finfo(s.dtype).eps)  # a factor's singular values are the roots of these
    return values, vectors, values > floor * values[..., -1:]


def function(values: Tensor, vectors: Tensor) -> Tensor:
    """vectors · diag(values) · vectorsᵀ."""
    return (vectors * values.unsqueeze(-2)) @ vectors.mT


def inverse(s: Tensor, ridge: float, eps: float) -> Tensor:
    """(s + ridge·I)⁺ of symmetric matrices, in which directions that `s` lacks stay out. All of them, where `s` is zero."""
    values, vectors, real = eigh(s, eps)
    return function(torch.where(real, 1 / (values + ridge).clamp_min(torch.finfo(s.dtype).tiny), 0), vectors)


def inverse_root(s: Tensor, eps: float) -> Tensor:
    """s^(−1/2) of symmetric matrices; directions that `s` lacks stay out."""
    values, vectors, real = eigh(s, eps)
    return function(torch.where(real, values.clamp_min(torch.finfo(s.dtype).tiny).rsqrt(), 0), vectors)


def sylvester(b: tuple[Tensor, Tensor], a: tuple[Tensor, Tensor], c: Tensor, floor: float = 1e-12) -> Tensor:
    """X of S_B·X + X·S_A = C, from the eigenvalues and eigenvectors of S_B and S_A; 0 where both eigenvalues are ~0."""
    (p, u), (q, v) = b, a
    total = p.unsqueeze(-1) + q.unsqueeze(-2)
    solved = torch.where(total > floor, (u.mT @ c @ v) / total.clamp_min(floor), 0)
    return u @ solved @ v.mT
