"""Golden values of the specification, and the projection identities by brute force (float64)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from one_pair import A0, B0, GS, W0, M, N, R, S, T, give, loss, pair, train, weight
from torch import Tensor

from rankfold.optim import LoraFa, LoraPro, LoraRite
from rankfold.optim.lora_pro import Sizes, project
from rankfold.optim.lora_rite import sides
from rankfold.optim.stacks import Stack

ZERO = torch.zeros_like(B0)
RITE: dict[str, Any] = {"lr": 0.05, "clip": 0, "escape": False}


def test_the_fixture() -> None:
    assert loss(pair()).item() == pytest.approx(26.2392200374, abs=1e-10)
    assert loss(pair(b=ZERO)).item() == pytest.approx(9.9045491772, abs=1e-10)


@pytest.mark.parametrize(
    ("cls", "b", "options", "losses"),
    [
        (LoraPro, B0, {"mode": "sgd", "lr": 0.1}, (21.4797704469, 17.5627057207, 14.3353917426)),
        (LoraPro, B0, {"mode": "full", "lr": 0.05}, (24.9286413663, 23.6629850411, 22.4404560918)),
        (LoraPro, B0, {"mode": "efficient", "lr": 0.05}, (22.8774861620, 20.1174073794, 17.9394095624)),
        (LoraPro, ZERO, {"mode": "sgd", "lr": 0.1}, (8.1617675538, 6.4669236744, 5.1970825206)),
        (LoraPro, ZERO, {"mode": "full", "lr": 0.05}, (9.0940268872, 8.2960721577, 7.5479092587)),
        (LoraRite, B0, RITE, (22.7283800675, 19.6401495875, 16.9439583434)),
        (LoraRite, B0, RITE | {"escape": True}, (22.7283800675, 19.6404047298, 16.9446120025)),
        (
            LoraRite, B0, RITE | {"cap": 0.5, "weight_decay": 0.1, "balance": True},
            (24.14589295, 22.18568886, 20.35423578, 18.64696159, 17.05899786, 15.58506432),
        ),
        (LoraRite, ZERO, RITE, (8.6917267653, 6.1880215696, 4.4356185108)),
        (LoraRite, B0, {"lr": 0.05, "clip": 1, "skip": 1}, (26.2392200374, 26.2392200374)),  # the release's defaults: nothing moves
    ],
)  # fmt: skip
def test_losses(cls: Any, b: Tensor, options: dict[str, Any], losses: tuple[float, ...]) -> None:
    p = pair(b=b)
    assert train(cls([p], **options), p, len(losses)) == pytest.approx(losses, abs=2e-8)


def test_rite_weight_after_one_step() -> None:
    p = pair()
    train(LoraRite([p], **RITE), p, 1)
    wanted = torch.tensor([2.54291050, 1.66773472, -0.64915104, -2.41266353]).double()
    torch.testing.assert_close(weight(p)[0], wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize("mode", ["sgd", "full"])
def test_a_zero_up_leaves_down_alone(mode: str) -> None:
    p = pair(b=ZERO)
    train(LoraPro([p], lr=0.1, mode=mode), p, 1)
    assert torch.equal(p.down, A0)
    assert p.up.any()


def projected(x_mode: str = "sylvester", a: Tensor = A0, b: Tensor = B0, g: Tensor = GS) -> tuple[Tensor, Tensor]:
    scale = torch.full((1, 1, 1), S).double()
    up, down, g_up, g_down = (t[None] for t in (b, a, S * g @ a.T, S * b.T @ g))
    h_up, h_down = project(up, down, g_up, g_down, scale, Sizes.of(up, down), x_mode)
    return h_up[0], h_down[0]


def test_lora_pro_golden_step() -> None:
    h_up, h_down = projected()
    torch.testing.assert_close(
        h_down,
        torch.tensor([[0.01783422, 0.02329999, 0.04345671, 0.03121073], [0.02823554, -0.01506482, -0.19788281, 0.08859596]]).double(),
        rtol=0, atol=1e-7,
    )  # fmt: skip
    wanted = [[0.37870402, -0.09104893], [-0.02066836, -0.48647677], [-0.24451738, -0.39274138], [-0.50028138, -0.26035840], [-0.26357732, 0.09757849]]  # fmt: skip
    torch.testing.assert_close(h_up, torch.tensor(wanted).double(), rtol=0, atol=1e-7)
    nearest = S * B0 @ h_down + S * h_up @ A0
    assert float(GS.norm()) == pytest.approx(3.17725247, abs=1e-7)
    assert float(nearest.norm()) == pytest.approx(2.67221284, abs=1e-7)
    assert float((GS - nearest).norm()) == pytest.approx(1.71878206, abs=1e-7)
    slope = -float((S * B0.T @ GS * h_down).sum() + (S * GS @ A0.T * h_up).sum())
    assert slope == pytest.approx(-7.14072145, abs=1e-6)
    _, without = projected("zero")
    x = (h_down - without) @ torch.linalg.pinv(A0)
    wanted = [[-0.03590663, -0.03863065], [0.05933859, 0.05221160]]
    torch.testing.assert_close(x, torch.tensor(wanted).double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("x_mode", ["sylvester", "symmetry", "zero"])
def test_the_step_is_the_projection(x_mode: str) -> None:
    h_up, h_down = projected(x_mode)
    # every matrix B·Y + Z·A, by its basis: the nearest to G by least squares
    basis = [S * B0 @ e.view(R, N) for e in torch.eye(R * N).double()] + [
        S * e.view(M, R) @ A0 for e in torch.eye(M * R).double()
    ]
    columns = torch.stack([b.flatten() for b in basis], 1)
    assert int(torch.linalg.matrix_rank(columns)) == R * (M + N) - R * R
    solution = torch.linalg.lstsq(columns, GS.flatten()[:, None], driver="gelsd").solution
    torch.testing.assert_close(
        (S * B0 @ h_down + S * h_up @ A0).flatten(), (columns @ solution)[:, 0], rtol=0, atol=1e-7
    )


def test_the_sylvester_x_is_nearest_to_the_gradients() -> None:
    h_up, h_down = projected()
    x = torch.zeros(R, R).double().requires_grad_()
    distance = (h_down + x @ A0 - S * B0.T @ GS).square().sum() + (h_up - B0 @ x - S * GS @ A0.T).square().sum()
    distance.backward()
    assert x.grad is not None
    assert float(x.grad.abs().max()) < 1e-6


def test_the_symmetric_x_balances_the_halves() -> None:
    def imbalance(x_mode: str) -> float:
        h_up, h_down = projected(x_mode)
        return float((B0 @ h_down - h_up @ A0).norm())

    assert imbalance("symmetry") == pytest.approx(1.311, abs=1e-3)
    assert imbalance("symmetry") < min(imbalance("sylvester"), imbalance("zero"))


def test_a_finite_step_is_the_projection_and_a_second_order() -> None:
    h_up, h_down = projected()
    p, eta = pair(), 0.1
    give(p, GS)
    before = weight(p)
    LoraPro([p], lr=eta, mode="sgd").step()
    wanted = -eta * (S * B0 @ h_down + S * h_up @ A0) + eta**2 * S * h_up @ h_down
    torch.testing.assert_close(weight(p) - before, wanted, rtol=0, atol=1e-12)


def test_full_mode_at_full_rank_is_adam_on_the_weight() -> None:
    a, b = torch.randn(N, N).double() + 2 * torch.eye(N), torch.randn(M, N).double()
    p, eta = pair(a, b, 1.0), 1e-5
    full = torch.nn.Parameter(weight(p).clone())
    adam, pro = torch.optim.Adam([full], lr=eta), LoraPro([p], lr=eta)
    for _ in range(5):
        full.grad = (full - T).detach()
        give(p, weight(p) - T)
        adam.step()
        pro.step()
    moved = (full.detach() - W0 - b @ a).abs().max()
    assert float((weight(p) - full.detach()).abs().max()) < 1e-3 * float(moved)


def test_lora_fa_golden_gradient() -> None:
    g = W0 + S * B0 @ A0 - T
    wanted = [[1.21219761, -0.05186217], [-1.29100649, -1.03765452], [-0.57737990, -0.17779815], [0.15249669, -1.35384731], [-0.91135274, -1.44197506]]  # fmt: skip
    wanted = torch.tensor(wanted).double()
    p = pair()
    optimizer = LoraFa([p], lr=0.1)
    give(p, g)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p.up]["exp_avg"] / 0.1, wanted, rtol=0, atol=1e-7)
    projector = torch.linalg.pinv(A0) @ A0
    torch.testing.assert_close(S * wanted @ A0, g @ projector, rtol=0, atol=1e-6)
    assert torch.equal(p.down, A0)


def test_rite_identities() -> None:
    p = pair()
    optimizer = LoraRite([p], lr=0.05, clip=0)
    give(p, GS)
    ((batch, _),) = Stack([p], {}).batches(optimizer.state, True, frozenset())
    down, up = sides(batch)
    basis_up, basis_down = (B0 @ down.over_other[0], A0.T @ up.over_other[0])
    for basis in (basis_up, basis_down):
        torch.testing.assert_close(basis.T @ basis, torch.eye(R).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(down.gradient[0], (S * GS.T @ basis_up).T, rtol=0, atol=1e-12)
    torch.testing.assert_close(up.gradient[0], (S * GS @ basis_down).T, rtol=0, atol=1e-12)
    before = weight(p)
    optimizer.state.clear()
    optimizer.step()
    m = optimizer.state[p.up]
    for name, rows in (("first_down", N), ("first_up", M)):
        # V = ĀᵀĀ/rows at the first step, so the whitened gradient has root mean square 1
        torch.testing.assert_close(m[name] @ m[name].T, rows * torch.eye(R).double(), rtol=1e-4, atol=1e-4)
    delta_down, delta_up = p.down.detach() - A0, p.up.detach() - B0
    torch.testing.assert_close(S * B0 @ delta_down, -0.05 * S * basis_up @ m["first_down"], rtol=0, atol=1e-12)
    torch.testing.assert_close(S * delta_up @ A0, -0.05 * S * m["first_up"].T @ basis_down.T, rtol=0, atol=1e-12)
    assert not torch.equal(weight(p), before)
