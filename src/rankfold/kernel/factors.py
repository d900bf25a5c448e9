"""The algebra of one low-rank update, ΔW = up · diag(gate) · down · scale.

    >>> f = Factors(down=torch.ones(2, 5), up=torch.ones(3, 2), scale=0.5)
    >>> f.delta().shape                      # out × in
    torch.Size([3, 5])
    >>> f.concat(f).rank                     # a stacked chain is a concat
    4
    >>> f.select(torch.tensor([True, False])).rank   # a pruned gate is a select
    1

Pure: no module, no PEFT. Every function works in the dtype of its tensors, float64 included. Those that need a QR widen
half precision to float32, because torch's QR does not support it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The factors of one update of a weight `W (out × in)`.

    Args:
        down: r × in. What LoRA calls A.
        up: out × r. What LoRA calls B.
        gate: r, or None for all ones.
        scale: multiplies the whole update.
        down_index, up_index: int64, r: if `down`'s rows, or `up`'s columns, are frozen and those of the identity, which ones.
            The kernel then gathers and scatters columns instead of multiplying. A hint: nothing else reads it.

    Raises:
        ValueError: shapes that do not fit together.
    """

    down: Tensor
    up: Tensor
    gate: Tensor | None = None
    scale: float = 1.0
    down_index: Tensor | None = None
    up_index: Tensor | None = None

    def __post_init__(self) -> None:
        rank = self.down.shape[0]
        if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] != rank:
            raise ValueError(
                f"Factors: up {tuple(self.up.shape)} is not out×{rank} for down {tuple(self.down.shape)} (r×in)"
            )
        if self.gate is not None and tuple(self.gate.shape) != (rank,):
            raise ValueError(f"Factors: gate {tuple(self.gate.shape)} is not ({rank},), the rank of down and up")
        for name, index, factor in (("down_index", self.down_index, self.down), ("up_index", self.up_index, self.up)):
            if index is not None and factor.requires_grad:
                raise ValueError(
                    f"Factors: {name} is given, but {name[:-6]} is trained; only a frozen factor stays what its index says"
                )
            if index is not None and (tuple(index.shape) != (rank,) or index.dtype != torch.int64):
                raise ValueError(
                    f"Factors: {name} {tuple(index.shape)} {index.dtype} is not ({rank},) int64, one index per component"
                )

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), the shape of the weight that is updated."""
        return self.up.shape[0], self.down.shape[1]

    def to(self, *args, **kwargs) -> Factors:
        """Every tensor through `Tensor.to`."""
        gate = None if self.gate is None else self.gate.to(*args, **kwargs)
        down, up = self.down.to(*args, **kwargs), self.up.to(*args, **kwargs)
        indices = [None if i is None else i.to(down.device) for i in (self.down_index, self.up_index)]
        return Factors(down, up, gate, self.scale, *indices)

    def detach(self) -> Factors:
        gate = None if self.gate is None else self.gate.detach()
        return replace(self, down=self.down.detach(), up=self.up.detach(), gate=gate)

    def baked(self) -> Factors:
        """The same update with gate and scale multiplied into `up`."""
        up = self.up if self.gate is None else (self.up * self.gate).to(self.up.dtype)
        return Factors(self.down, up * self.scale if self.scale != 1.0 else up)

    def delta(self) -> Tensor:
        """The dense update, out × in."""
        f = self.baked()
        return f.up @ f.down

    def scaled(self, s: float) -> Factors:
        return replace(self, scale=self.scale * s)

    def select(self, keep: Tensor) -> Factors:
        """The components that `keep` (bool r, or indices) names, in that order."""
        gate, *indices = [None if t is None else t[keep] for t in (self.gate, self.down_index, self.up_index)]
        return Factors(self.down[keep], self.up[:, keep], gate, self.scale, *indices)

    def concat(self, *others: Factors) -> Factors:
        """The sum of the updates, as one pair whose rank is the sum of the ranks."""
        parts = (self, *others)
        if len({p.shape for p in parts}) > 1:
            raise ValueError(f"Factors.concat: updates of different weights: {[p.shape for p in parts]}")
        if len(parts) == 1:
            return self
        down = torch.cat([p.down for p in parts])
        if all(p.gate is None and p.scale == self.scale for p in parts):
            return Factors(down, torch.cat([p.up for p in parts], 1), scale=self.scale)
        # Gates are float32 at least: a scale is not rounded to the factors' half precision
        wide = torch.promote_types(self.up.dtype, torch.float32)
        gates = [p.up.new_ones(p.rank, dtype=wide) if p.gate is None else p.gate for p in parts]
        return Factors(
            down,
            torch.cat([p.up for p in parts], 1),
            torch.cat([g * p.scale for g, p in zip(gates, parts, strict=True)]),
        )

    def pad(self, rank: int) -> Factors:
        """Zero components appended up to `rank`; raises ValueError where the rank is larger already."""
        extra = rank - self.rank
        if extra < 0:
            raise ValueError(f"Factors.pad: rank {self.rank} exceeds {rank}; compress first")
        if extra == 0:
            return self
        down = torch.cat([self.down, self.down.new_zeros(extra, self.down.shape[1])])
        up = torch.cat([self.up, self.up.new_zeros(self.up.shape[0], extra)], 1)
        gate = None if self.gate is None else torch.cat([self.gate, self.gate.new_zeros(extra)])
        return Factors(down, up, gate, self.scale)

    def balanced(self) -> Factors:
        """Gate and scale baked in and each component's norm split evenly, ‖up_i‖ = ‖down_i‖; a dead component is zero."""
        gain = self.up.new_ones(self.rank) if self.gate is None else self.gate.to(self.up.dtype)
        gain = gain * self.scale
        up, down = self.up.norm(dim=0) * gain.abs(), self.down.norm(dim=1)
        alive = (up > 0) & (down > 0)
        ratio = torch.where(alive, (down / up.where(alive, torch.ones_like(up))).sqrt(), torch.zeros_like(up))
        inverse = torch.where(alive, 1 / ratio.where(alive, torch.ones_like(ratio)), torch.zeros_like(ratio))
        return Factors(self.down * inverse[:, None], self.up * (gain * ratio))

    def alive(self) -> Factors:
        """Without the components that add nothing: a zero column of `up`, row of `down`, gate or scale."""
        gain = self.up.new_tensor(self.scale) if self.gate is None else self.gate * self.scale
        alive = self.up.any(dim=0) & self.down.any(dim=1) & (gain != 0)
        return self if alive.all() else self.select(alive)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (out × q), σ (q, descending), Vᵀ (q × in) of ΔW with q = min(r, out, in), by QR of both factors and an SVD
        of the small core: never of an out × in matrix. In float32 at least."""
        f = self._wide().baked()
        q_up, r_up = torch.linalg.qr(f.up)
        q_down, r_down = torch.linalg.qr(f.down.T)
        u, sigma, vt = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
        return q_up @ u, sigma, vt @ q_down.T

    def _wide(self) -> Factors:
        return self.to(torch.promote_types(self.up.dtype, torch.float32))

    def compress(self, rank: int | None = None, *, energy: float | None = None) -> Factors:
        """The best approximation in the Frobenius norm.

        Args:
            rank: at most this many components.
            energy: the fewest components that keep this share, 0 < energy ≤ 1, of ‖ΔW‖²_F.

        Raises:
            ValueError: neither or both given, or out of range.
        """
        if (rank is None) == (energy is None):
            raise ValueError("Factors.compress: give either rank or energy")
        u, sigma, vt = self.svd()
        if energy is not None:
            if not 0 < energy <= 1:
                raise ValueError(f"Factors.compress: energy={energy} is not in (0, 1]")
            kept = sigma.cpu().double().square().cumsum(0)  # in float32, energy=1 would lose all σ below 3e-4·σ₁
            rank = int((kept < energy * kept[-1]).sum()) + 1 if len(sigma) and kept[-1] > 0 else 0
        assert rank is not None
        if rank < 0:
            raise ValueError(f"Factors.compress: rank={rank} is negative")
        root = sigma[:rank].sqrt()
        return Factors(root[:, None] * vt[:rank], u[:, :rank] * root)

    def norm(self) -> Tensor:
        """‖ΔW‖_F from r×r products of the QR cores (exact to rounding, no cancellation)."""
        f = self._wide().baked()
        if f.rank == 0:
            return f.up.new_zeros(())
        return (torch.linalg.qr(f.up).R @ torch.linalg.qr(f.down.T).R.T).norm()

    def minus(self, other: Factors) -> Factors:
        """The difference of two updates, as factors."""
        return self.concat(other.scaled(-1.0))
