"""(A, B) and (R·A, B·R⁻¹) are one adapter: what a step of W owes to the factorisation, with the pair written anew in mid-training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from one_pair import A0, B0, loss, pair, weight
from torch import Tensor

from rankfold.optim import LoraPro, LoraRite, Riemannian

TURN = torch.tensor([[2.0, 0.3], [-0.5, 0.7]]).double()


def path(make: Any, rewrite_at: int | None, start: Tensor | None = None, steps: int = 8) -> Tensor:
    """W after `steps`, the pair being rewritten before step `rewrite_at`."""
    p = pair() if start is None else pair(start @ A0, B0 @ torch.linalg.inv(start))
    optimizer = make([p])
    for step in range(steps):
        if step == rewrite_at:
            with torch.no_grad():
                p.down.copy_(TURN @ p.down)
                p.up.copy_(p.up @ torch.linalg.inv(TURN))
        optimizer.zero_grad()
        loss(p).backward()
        optimizer.step()
    return weight(p)


RITE: list[dict[str, Any]] = [
    {}, {"escape": False}, {"cap": 0.5}, {"weight_decay": 0.1}, {"clip": 0.0}, {"clip": 0.5}, {"skip": 6.0, "clip": 0.0},
]  # fmt: skip


@pytest.mark.parametrize("options", RITE, ids=str)
@pytest.mark.parametrize("at", [0, 3])
def test_rite(options: dict[str, Any], at: int) -> None:
    make = lambda pairs: LoraRite(pairs, lr=0.05, **options)  # noqa: E731
    torch.testing.assert_close(path(make, at), path(make, None), rtol=0, atol=1e-11)


@pytest.mark.parametrize("x_mode", ["zero", "symmetry"])
@pytest.mark.parametrize("mode", ["full", "sgd"])
def test_lora_pro(mode: str, x_mode: str) -> None:
    make = lambda pairs: LoraPro(pairs, lr=0.05, mode=mode, x_mode=x_mode)  # noqa: E731
    torch.testing.assert_close(
        path(make, 3), path(make, None), rtol=0, atol=1e-6
    )  # δ = 1e-8 in the inverse is not invariant


def test_sylvester_differs_in_second_order_only() -> None:
    def apart(lr: float) -> float:
        make = lambda pairs: LoraPro(pairs, lr=lr, mode="full")  # noqa: E731
        return float((path(make, None, TURN) - path(make, None)).abs().max())

    assert apart(0.05) == pytest.approx(5e-3, rel=0.2)
    assert apart(0.005) == pytest.approx(6e-5, rel=0.2)


def test_riemannian_sgd() -> None:
    make = lambda pairs: Riemannian(pairs, lr=0.05, reg=0.0, base="sgd")  # noqa: E731
    torch.testing.assert_close(path(make, 3), path(make, None), rtol=0, atol=1e-11)


def test_adam_is_not_invariant() -> None:
    make = lambda pairs: torch.optim.Adam([pairs[0].down, pairs[0].up], lr=0.05)  # noqa: E731
    assert float((path(make, 0) - path(make, None)).norm()) > 0.1


def test_balance_keeps_the_product() -> None:
    p, q = pair(), pair()
    plain, balanced = LoraRite([p], lr=0.05), LoraRite([q], lr=0.05, balance=True)
    for x, optimizer in ((p, plain), (q, balanced)):
        loss(x).backward()
        optimizer.step()
    torch.testing.assert_close(weight(q), weight(p), rtol=0, atol=1e-12)
    assert q.down.norm().item() == pytest.approx(q.up.norm().item(), rel=1e-6)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_escaped_mass(orthogonal: bool) -> None:
    """A basis that only turns loses nothing; any other loses at most the trace."""
    p = pair()
    optimizer = LoraRite([p], lr=0.0, clip=0)
    loss(p).backward()
    optimizer.step()
    before = optimizer.state[p.up]["second_down"].clone()
    with torch.no_grad():
        if orthogonal:
            turn, _ = torch.linalg.qr(TURN)
            p.down.copy_(turn @ p.down)
            p.up.copy_(p.up @ turn.T)
        else:
            p.up.copy_(torch.randn_like(p.up))
    p.down.grad, p.up.grad = torch.zeros_like(p.down), torch.zeros_like(p.up)
    optimizer.step()
    state = optimizer.state[p.up]
    escaped, beta = float(state["escaped_down"]), 0.999 * (1 - 0.999) / (1 - 0.999**2)
    lost = float(before.trace() - state["second_down"].trace() / beta)
    if orthogonal:
        assert abs(escaped) < 1e-12
        assert abs(lost) < 1e-9
    else:
        assert 0 < escaped / beta <= lost + 1e-12
