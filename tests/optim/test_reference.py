"""Trajectories beside other code: a loop over layers written from the specification alone, and PEFT's own optimisers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from one_pair import B0, pair
from one_pair import train as descent
from peft.optimizers import create_riemannian_optimizer
from peft.optimizers.lorafa import create_lorafa_optimizer
from small_llama import adapted, train, trained
from torch import Tensor

from rankfold.optim import LoraFa, LoraPlus, LoraPro, LoraRite, Riemannian
from rankfold.optim.pairs import Pair

ETA = 0.02
BETAS = (0.9, 0.99)
EPS = 1e-6


def decay(beta: float, t: int) -> float:
    return beta * (1 - beta ** (t - 1)) / (1 - beta**t)


class RiteByTheBook:
    """LoRA-RITE as §3 of the specification has it: one layer after another, QR, explicit inverses."""

    def __init__(
        self, pairs: list[Pair], escape: bool, clip: float, skip: float, cap: float, wd: float, balance: bool
    ) -> None:
        self.pairs, self.t, self.kept = pairs, 0, [[{}, {}] for _ in pairs]
        self.escape, self.clip, self.skip, self.cap, self.wd, self.balance = escape, clip, skip, cap, wd, balance

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        work = []
        for p in self.pairs:
            (u_b, r_b), (u_a, r_a) = torch.linalg.qr(p.up), torch.linalg.qr(p.down.T)
            inverse_b, inverse_a = torch.linalg.pinv(r_b), torch.linalg.pinv(r_a)
            bar_a, bar_b = p.down.grad.T @ inverse_b, p.up.grad @ inverse_a  # pyright: ignore[reportOptionalMemberAccess]
            bars = [
                torch.zeros_like(x) if self.skip and x.square().mean().sqrt() > self.skip else x for x in (bar_a, bar_b)
            ]
            work.append((p, bars, (u_b, u_a), (inverse_b, inverse_a)))
        norm = math.sqrt(sum(float(x.square().sum()) for _, bars, _, _ in work for x in bars))
        if self.clip and norm > self.clip:
            work = [(p, [x * self.clip / norm for x in bars], u, inv) for p, bars, u, inv in work]
        for (p, bars, bases, inverses), kept in zip(work, self.kept, strict=True):
            deltas = [self.side(*x) for x in zip(bars, bases, inverses, kept, strict=True)]
            a, b = p.down.clone(), p.up.clone()
            p.down.copy_(a - ETA * (deltas[0].T + self.wd * a))
            p.up.copy_(b - ETA * (deltas[1] + self.wd * b))
            if self.balance:
                l, q = p.down.norm() + 1e-6, p.up.norm() + 1e-6
                p.down.mul_((l * q).sqrt() / l)
                p.up.mul_((l * q).sqrt() / q)

    def side(self, bar: Tensor, basis: Tensor, inverse: Tensor, kept: dict[str, Any]) -> Tensor:
        r = bar.shape[1]
        if not kept:
            kept |= {"U": torch.zeros_like(basis), "V": bar.new_zeros(r, r), "M": torch.zeros_like(bar), "rho": 0.0}
        b1, b2 = (decay(b, self.t) for b in BETAS)
        turn = basis.T @ kept["U"]
        turned = turn @ kept["V"] @ turn.T
        if self.escape:
            gap = (torch.linalg.eigvalsh(kept["V"]) - torch.linalg.eigvalsh(turned)).max()
            kept["rho"] = b2 * (kept["rho"] + max(0.0, min(float(gap), float(kept["V"].trace() - turned.trace()))))
        kept["V"] = b2 * turned + (1 - b2) * bar.T @ bar / bar.shape[0]
        w, q = torch.linalg.eigh(kept["V"])
        s = bar @ q @ torch.diag(1 / ((w.clamp(min=0) + kept["rho"]).sqrt() + EPS)) @ q.T
        kept["M"] = b1 * kept["M"] @ turn.T + (1 - b1) * s
        kept["U"] = basis
        m = kept["M"]
        if self.cap:
            m = m / max(1.0, float(m.square().mean().sqrt()) / self.cap)
        return m @ inverse.T


SHAPES = [(6, 5, 2), (7, 4, 3), (6, 5, 2), (9, 8, 1)]


def several() -> list[Pair]:
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return [pair(draw(r, n), draw(m, r), 0.5 + i, f"layer.{i}") for i, (m, n, r) in enumerate(SHAPES)]


def descend(pairs: list[Pair], step: Callable[[], object], steps: int = 10) -> Tensor:
    """Regression to fixed targets, coupled over layers so that a mistake in one shows in all."""
    g = torch.Generator().manual_seed(4)
    targets = [torch.randn(m, n, generator=g, dtype=torch.float64) for m, n, _ in SHAPES]
    for _ in range(steps):
        losses = [(p.scale * p.up @ p.down - t).square().mean() for p, t in zip(pairs, targets, strict=True)]
        torch.stack(losses).sum().sqrt().backward()
        step()
        for p in pairs:
            p.down.grad = p.up.grad = None
    return torch.cat([(p.scale * p.up @ p.down).detach().flatten() for p in pairs])


@pytest.mark.parametrize("escape", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"clip": 0.3}, {"skip": 0.1}, {"cap": 0.4}, {"weight_decay": 0.1}, {"balance": True, "clip": 0.5, "cap": 0.5}],
    ids=str,
)
def test_lora_rite_by_the_book(escape: bool, options: dict[str, Any]) -> None:
    options = {"clip": 0.0, "skip": 0.0, "cap": 0.0, "weight_decay": 0.0, "balance": False, **options}
    ours, book = several(), several()
    by_the_book = RiteByTheBook(book, escape, *(options[k] for k in ("clip", "skip", "cap", "weight_decay", "balance")))
    optimizer = LoraRite(ours, lr=ETA, betas=BETAS, eps=EPS, escape=escape, **options)
    torch.testing.assert_close(descend(ours, optimizer.step), descend(book, by_the_book.step), rtol=0, atol=1e-12)


def test_lora_pro_by_the_book() -> None:
    """Full mode, one layer after another, with explicit projectors and a Kronecker solver."""
    ours, book = several(), several()
    state = [{"m": torch.zeros(m, n).double(), "v": torch.zeros(m, n).double()} for m, n, _ in SHAPES]
    count = 0

    def project(p: Pair, g_a: Tensor, g_b: Tensor, with_x: bool) -> tuple[Tensor, Tensor]:
        a, b, s = p.down.detach(), p.up.detach(), p.scale
        r = len(a)
        eye = torch.eye(r).double()
        over_b, over_a = torch.linalg.inv(b.T @ b + 1e-8 * eye), torch.linalg.inv(a @ a.T + 1e-8 * eye)
        h_a, h_b = over_b @ g_a / s**2, (g_b - b @ over_b @ b.T @ g_b) @ over_a / s**2
        if with_x:
            # row-major vec: (S_B ⊗ I + I ⊗ S_A) vec(X) = vec(C)
            system = torch.kron(b.T @ b, eye) + torch.kron(eye, a @ a.T)
            x = torch.linalg.solve(system, -(over_b @ g_a @ a.T / s**2).flatten()).view(r, r)
            h_a, h_b = h_a + x @ a, h_b - b @ x
        return h_a, h_b

    @torch.no_grad()
    def step() -> None:
        nonlocal count
        count += 1
        for p, kept in zip(book, state, strict=True):
            assert p.down.grad is not None
            assert p.up.grad is not None
            h_a, h_b = project(p, p.down.grad, p.up.grad, False)
            g = p.scale * (p.up @ h_a + h_b @ p.down)
            kept["m"] = 0.9 * kept["m"] + 0.1 * g
            kept["v"] = 0.99 * kept["v"] + 0.01 * g * g
            u = (kept["m"] / (1 - 0.9**count)) / (kept["v"].sqrt() / math.sqrt(1 - 0.99**count) + 1e-8)
            d_a, d_b = project(p, p.scale * p.up.T @ u, p.scale * u @ p.down.T, True)
            p.down.sub_(d_a, alpha=ETA)
            p.up.sub_(d_b, alpha=ETA)

    optimizer = LoraPro(ours, lr=ETA, betas=BETAS)
    torch.testing.assert_close(descend(ours, optimizer.step), descend(book, step), rtol=0, atol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lora_fa_beside_peft(weight_decay: float) -> None:
    """In float64, where PEFT's product is not in bf16. PEFT's ranks and scales differ by layer here."""
    kwargs: dict[str, Any] = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 5}}
    ours, theirs = (adapted(**kwargs).double() for _ in range(2))
    reference = create_lorafa_optimizer(theirs, r=4, lora_alpha=8, lr=0.01, weight_decay=weight_decay)
    for group in reference.param_groups:  # it takes the frozen base along, without gradients
        group["eps"] = EPS
    train(theirs, reference, range(6))
    train(ours, LoraFa(ours, lr=0.01, weight_decay=weight_decay), range(6))
    expected, found = trained(theirs), trained(ours)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=3e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("base", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_riemannian_beside_peft(base: str, dtype: torch.dtype) -> None:
    ours, theirs = (adapted().to(dtype) for _ in range(2))
    cls = torch.optim.AdamW if base == "adamw" else torch.optim.SGD
    reference = create_riemannian_optimizer(theirs, cls, lr=0.003, reg=0.05, weight_decay=0.0)
    train(theirs, reference, range(6))
    train(ours, Riemannian(ours, lr=0.003, reg=0.05, base=base), range(6))
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4  # Adam's sign-like first steps amplify rounding
    for name, value in trained(theirs).items():
        torch.testing.assert_close(
            trained(ours)[name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_lora_plus_golden() -> None:
    for ratio, losses in {
        1: (9.5905314189, 9.2839503225, 8.9833022209),
        4: (8.7441140267, 7.7504180891, 6.8935986474),
        16: (6.7929827007, 5.0590855145, 4.3012226694),
    }.items():
        p = pair(b=torch.zeros_like(B0))
        assert descent(LoraPlus([p], lr=0.01, ratio=ratio), p, 3) == pytest.approx(losses, abs=1e-9)


def test_lora_plus_at_ratio_one_is_adamw() -> None:
    ours, plain = adapted(), adapted()
    train(ours, LoraPlus(ours, lr=0.01, ratio=1.0), range(4))
    train(
        plain, torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.01, weight_decay=0), range(4)
    )
    for name, value in trained(plain).items():
        assert torch.equal(trained(ours)[name], value), name
