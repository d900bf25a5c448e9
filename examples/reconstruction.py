"""How well LoRA and RaSA can approximate given updates M_1 … M_L of one module type (RaSA, arXiv 2503.12576, §3, appendix A).

    LoRA:  e_lora    = min Σ_i ‖M_i − B_i A_i‖²_F                      rank r each
    RaSA:  e_rasa(k) = min Σ_i ‖M_i − (B̃_i Ã_i + B_S D_i A_S)‖²_F      rank r−k each and a pool of rank Lk

Theorem 3.1, e_rasa(k) ≤ e_lora, is `feasible_point`: it attains e_lora, and `coordinate_descent` goes down from it. Pure
linear algebra on lists of matrices, in their own dtype (give float64); it says nothing about trained accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold.kernel.factors import Factors


@dataclass(frozen=True)
class RasaFit:
    """RaSA's factors of L updates.

    Args:
        private: B̃_i and Ã_i, rank r−k, one a layer.
        pool: B_S and A_S, rank Lk.
        gates: diag(D_i), one a layer.
    """

    private: tuple[Factors, ...]
    pool: Factors
    gates: tuple[Tensor, ...]

    def updates(self) -> list[Factors]:
        """What each layer adds, at rank r−k+Lk, private components first."""
        return [
            f.concat(Factors(self.pool.down, self.pool.up, d)) for f, d in zip(self.private, self.gates, strict=True)
        ]

    def error(self, targets: Sequence[Tensor]) -> float:
        """Σ_i ‖M_i − ΔW_i‖²_F."""
        return sum((m - f.delta()).square().sum().item() for m, f in zip(targets, self.updates(), strict=True))


def lora_error(targets: Sequence[Tensor], r: int) -> float:
    """e_lora = Σ_i Σ_{j>r} σ_j(M_i)²: the least that LoRA of rank r leaves.

    Raises:
        ValueError: no targets, targets of different shapes, or r < 1.
    """
    _check(targets, r, 0)
    return sum(torch.linalg.svdvals(m)[r:].square().sum().item() for m in targets)


def feasible_point(targets: Sequence[Tensor], r: int, k: int) -> RasaFit:
    """The point that proves the theorem; its error is e_lora.

    B̃_i Ã_i is the top r−k terms of M_i's SVD, the pool holds the singular vectors r−k+1 … r of all layers side by side, and
    D_i the matching singular values in layer i's own k slots, 0 elsewhere.

    Raises:
        ValueError: as `lora_error`, r > min(out, in), or not 0 ≤ k ≤ r.
    """
    _check(targets, r, k)
    spectra = [_leading(m, r) for m in targets]
    private = tuple(_balanced(u[:, : r - k], sigma[: r - k], vt[: r - k]) for u, sigma, vt in spectra)
    slots = slice(r - k, r)
    pool = Factors(torch.cat([vt[slots] for _, _, vt in spectra]), torch.cat([u[:, slots] for u, _, _ in spectra], 1))
    gates = (
        torch.block_diag(*(sigma[None, slots] for _, sigma, _ in spectra)) if k else pool.up.new_zeros(len(targets), 0)
    )
    return RasaFit(private, pool, tuple(gates))


def coordinate_descent(
    targets: Sequence[Tensor], r: int, k: int, sweeps: int = 10, start: RasaFit | None = None
) -> tuple[list[float], RasaFit]:
    """Descends block by block, each step the exact minimum in its block.

    Args:
        start: by default `feasible_point`, so that no sweep ends above e_lora.

    Returns:
        The errors, first that of the start, then one a sweep; never rising, to rounding. And the last point.

    Raises:
        ValueError: as `feasible_point`.
    """
    _check(targets, r, k)
    fit = feasible_point(targets, r, k) if start is None else start
    errors = [fit.error(targets)]
    for _ in range(sweeps if k else 0):  # without a pool the start is the optimum
        fit = _sweep(targets, fit, r - k)
        errors.append(fit.error(targets))
    return errors + errors[-1:] * (sweeps + 1 - len(errors)), fit


def _sweep(targets: Sequence[Tensor], fit: RasaFit, private_rank: int) -> RasaFit:
    """Private factors, then B_S, A_S and D, in the order of appendix A; its transposes re-derived."""
    a, b, d = fit.pool.down, fit.pool.up, torch.stack(fit.gates)
    private = fit.private  # nothing to do where they have rank 0
    if private_rank:
        rest = (m - (b * g) @ a for m, g in zip(targets, d, strict=True))
        private = tuple(_balanced(*_leading(m, private_rank)) for m in rest)
    left = [m - f.delta() for m, f in zip(targets, private, strict=True)]  # R_i = M_i − B̃_i Ã_i
    # Pseudo-inverses: the Gram matrices start singular, because the layers' slots of D are disjoint
    overlap = d.T @ d  # Σ_i D_i X D_i = X ∘ Σ_i d_i d_iᵀ
    b = torch.stack([m @ a.T * g for m, g in zip(left, d, strict=True)]).sum(0) @ _pinv(a @ a.T * overlap)
    a = _pinv(b.T @ b * overlap) @ torch.stack([g[:, None] * (b.T @ m) for m, g in zip(left, d, strict=True)]).sum(0)
    gram = _pinv(b.T @ b * (a @ a.T))
    # diag(B_Sᵀ R_i A_Sᵀ) without the Lk × Lk product
    d = torch.stack([gram @ ((b.T @ m) * a).sum(1) for m in left])
    return RasaFit(private, Factors(a, b), tuple(d))


def _leading(m: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ and Vᵀ of the leading terms of the SVD, by the eigenvectors of the smaller Gram matrix: many times faster, and
    what the squares lose lies below 1e-16 of ‖m‖² in float64."""
    if m.shape[0] > m.shape[1]:
        u, sigma, vt = _leading(m.T, rank)
        return vt.T, sigma, u.T
    u = torch.linalg.eigh(m @ m.T).eigenvectors.flip(1)[:, :rank]
    rows = u.T @ m
    return u, rows.norm(dim=1), torch.nn.functional.normalize(rows, dim=1, eps=torch.finfo(m.dtype).tiny)


def _balanced(u: Tensor, sigma: Tensor, vt: Tensor) -> Factors:
    root = sigma.sqrt()
    return Factors(root[:, None] * vt, u * root)


def _pinv(gram: Tensor) -> Tensor:
    return torch.linalg.pinv(gram, hermitian=True)


def _check(targets: Sequence[Tensor], r: int, k: int) -> None:
    shapes = {tuple(m.shape) for m in targets}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ValueError(f"targets must be one or more matrices of one shape; found the shapes {sorted(shapes)}")
    if not 1 <= r <= min(next(iter(shapes))):
        raise ValueError(f"r={r} must be from 1 to {min(next(iter(shapes)))}, the smaller side of the targets")
    if not 0 <= k <= r:
        raise ValueError(f"k={k} exceeds r={r}; choose 0 <= k <= r")
