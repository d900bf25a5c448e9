"""The fixture of the golden values, in float64: one pair, a quadratic loss, and a loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rankfold.optim.pairs import Pair

M, N, R, S = 5, 4, 2, 2.0


def grid(rows: int, columns: int, f: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    i, j = torch.meshgrid(torch.arange(rows).double(), torch.arange(columns).double(), indexing="ij")
    return f(i, j)


A0 = grid(R, N, lambda i, j: torch.sin(1 + 4 * i + j))
B0 = grid(M, R, lambda i, j: torch.cos(1 + 2 * i + j))
W0 = grid(M, N, lambda i, j: torch.cos(0.3 * i + 0.9 * j))
T = grid(M, N, lambda i, j: torch.sin(0.2 + 1.1 * i - 0.6 * j))
GS = grid(M, N, lambda i, j: torch.sin(0.5 + 0.7 * i + 1.3 * j * (1 + 0.1 * i)))


def pair(a: Tensor = A0, b: Tensor = B0, s: float = S, name: str = "toy") -> Pair:
    return Pair(name, nn.Parameter(a.clone()), nn.Parameter(b.clone()), s)


def loss(p: Pair) -> Tensor:
    return 0.5 * (W0.to(p.up) + p.scale * p.up @ p.down - T.to(p.up)).square().sum()


def give(p: Pair, g: Tensor) -> None:
    """Leaves in the pair what a full gradient g leaves."""
    p.down.grad = p.scale * p.up.detach().T @ g
    p.up.grad = p.scale * g @ p.down.detach().T


def weight(p: Pair) -> Tensor:
    return (W0.to(p.up) + p.scale * p.up @ p.down).detach()


def train(optimizer: torch.optim.Optimizer, p: Pair, steps: int) -> list[float]:
    """The loss after each step."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss(p).backward()
        optimizer.step()
        losses.append(float(loss(p).detach()))
    return losses
