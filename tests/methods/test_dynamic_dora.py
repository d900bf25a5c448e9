"""Dynamic DoRA against section 4 of the specification, and against a plain transcript of the authors' loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from rankfold import DynamicDoraConfig, attach
from rankfold.host.linear_layer import AdaptedLinear
from rankfold.methods.dynamic_dora import DynamicDora, cut
from rankfold.plan.peft_methods import fields_at

TOTAL = 40


def dora(dtype: torch.dtype = torch.float32, base: Any = None, **changes: Any) -> PeftModel:
    defaults = {
        "r": 6,
        "target_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "interval": 3,
        "target_modules": ["0", "2"],
    }
    with torch.random.fork_rng():
        torch.manual_seed(5)
        base = base or nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
        torch.manual_seed(6)
        return get_peft_model(base.to(dtype), DynamicDoraConfig(**{**defaults, **changes}))  # pyright: ignore[reportArgumentType, reportReturnType]


def adapters(m: nn.Module) -> list[Any]:
    return [layer.adapters(["default"])[0] for layer in m.modules() if isinstance(layer, AdaptedLinear)]


def one(r: int = 6, *, live: bool = True, seed: int = 0) -> DynamicDora:
    (a,) = adapters(dora(r=r, target_r=1, target_modules=["0"]))
    if live:
        with torch.no_grad():
            a.gate.copy_(torch.randn(r, generator=torch.Generator().manual_seed(seed)))
    return a


def batch(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=g), torch.randn(16, 5, generator=g)


def adamw(m: nn.Module, lr: float = 0.02) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=lr)


def step(m: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    optimizer.zero_grad()
    x, y = batch(t)
    F.mse_loss(m(x), y).backward()
    optimizer.step()


# The schedule --------------------------------------------------------------------------------------------------------


def test_the_start_is_one_and_a_half_times_the_target_rounded_up() -> None:
    """As the authors' code has it; PEFT's AdaLoRA is compared from the same start."""
    starts = {1: 2, 2: 3, 3: 5, 4: 6, 7: 11, 8: 12}
    assert {r: DynamicDoraConfig.fields_at(r)["r"] for r in starts} == starts
    assert {r: fields_at("peft:adalora", r)["init_r"] for r in starts} == starts


def test_schedule_golden() -> None:
    """72 matrices, 12 → 8: of 864 components 288 go."""
    wanted = {0: 0, 875: 4, 1750: 36, 2625: 121, 3500: 288}
    assert {tau: cut(tau, 3500, 288) for tau in wanted} == wanted
    course = [cut(tau, 3500, 288) for tau in range(3501)]
    assert course == sorted(course)
    assert course[1750] < 288 / 2  # slow first


def test_pruning_runs_from_15_to_50_percent() -> None:
    m = dora()
    controller: Any = attach(m, adamw(m), total_steps=10000).controllers["default"]
    assert controller.tau_max == 3500
    assert [controller.tau(t) for t in (1, 1498, 1499, 1500, 1501, 5000)] == [-1499, -2, -1, 0, 1, 3500]


@pytest.mark.parametrize(("total", "interval"), [(40, 1), (40, 3), (40, 100), (23, 2)])
def test_what_is_left_follows_the_schedule(total: int, interval: int) -> None:
    m = dora(interval=interval)
    optimizer = adamw(m)
    controller: Any = attach(m, optimizer, total_steps=total).controllers["default"]
    tau_max, cuts, back = int(total * 0.35), 0, 0
    final: list[Tensor] = []
    for t in range(1, total + 1):
        before = sum(a.alive() for a in adapters(m))
        step(m, optimizer, t)
        tau, left = int(t - 0.15 * total), sum(a.alive() for a in adapters(m))
        assert controller.tau(t) == tau
        if 0 <= tau <= tau_max and (tau % interval == 0 or tau == tau_max):
            assert left == 12 - max(int(4 * (tau / tau_max) ** 3), 1)  # the code cuts one at τ = 0
            cuts += 1
        elif tau < tau_max:
            assert left >= before
            back += left > before and tau > 0  # all are 0 before the first step
        if tau == tau_max:
            assert left == 8
            final = [a.gate == 0 for a in adapters(m)]
            assert all(torch.equal(f, mask) for f, mask in zip(controller.state["final"], final, strict=True))
        elif tau > tau_max:
            assert all(torch.equal(a.gate == 0, mask) for a, mask in zip(adapters(m), final, strict=True))
        assert controller.finished() == (tau >= tau_max)
    assert cuts >= 2
    assert (back > 0) == (interval > 1)  # between two cuts a component may come back


def test_after_the_cuts_scores_rest_and_the_penalty_is_off() -> None:
    m = dora()
    optimizer = adamw(m)
    controller: Any = attach(m, optimizer, total_steps=TOTAL).controllers["default"]
    for t in range(1, 21):
        assert controller.extra_loss() is not None
        step(m, optimizer, t)
    scores = [s.clone() for s in controller.state["S"]]
    assert controller.finished()
    for t in range(21, TOTAL + 1):
        assert controller.extra_loss() is None
        step(m, optimizer, t)
    assert all(torch.equal(s, old) for s, old in zip(controller.state["S"], scores, strict=True))


def test_a_very_short_run_is_refused() -> None:
    m = dora()
    with pytest.raises(ValueError, match=r"start=0\.15 and end=0.5 leave no step to cut ranks in a run of 2"):
        attach(m, adamw(m), total_steps=2)
    for bad in ({"start": 0.6, "end": 0.5}, {"start": -0.1}, {"interval": 0}, {"beta": 1.0}, {"dem_weight": -1.0}):
        with pytest.raises(ValueError, match=f"DynamicDoraConfig: {next(iter(bad))}="):
            DynamicDoraConfig(**bad)


# Scores --------------------------------------------------------------------------------------------------------------


def brute_force(down: Tensor, up: Tensor, c: Tensor) -> Tensor:
    """The authors' way: an r × out × in tensor."""
    parts = c[:, None, None] * up.T[:, :, None] * down[:, None, :]
    return parts.flatten(1).norm(dim=1) / (parts.sum(0).norm() + 1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_norms_equal_brute_force(seed: int) -> None:
    a = one(seed=seed)
    torch.testing.assert_close(a.shares(), brute_force(a.down, a.up, a.gate), rtol=2e-6, atol=1e-7)


@torch.no_grad()
def test_shares_sum_to_one_only_where_aligned() -> None:
    a = one()
    assert a.shares().sum() > 1  # triangle inequality
    a.down.copy_(a.down[:1].expand_as(a.down))
    a.up.copy_(a.up[:, :1].expand_as(a.up))
    a.gate.abs_()
    assert a.shares().sum().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(a.shares(), a.gate / a.gate.sum())
    a.gate[0] *= -1
    assert a.shares().sum() > 1
    assert one(1).shares().tolist() == pytest.approx([1.0], abs=1e-6)
    assert one(live=False).shares().tolist() == [0.0] * 6  # before the first step: no division by zero


@torch.no_grad()
def test_shares_are_invariant() -> None:
    a = one()
    before = a.shares()
    a.gate.mul_(37.0)  # the whole update
    torch.testing.assert_close(a.shares(), before)
    a.up[:, 2].mul_(5.0)  # one component's norm moves between its factors
    a.down[2].div_(5.0)
    torch.testing.assert_close(a.shares(), before)


# The DEM loss --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_dem_golden() -> None:
    m = dora(dem_weight=0.3)
    controller = attach(m, adamw(m), total_steps=TOTAL).controllers["default"]
    vectors = [v for a in adapters(m) for v in (*a.down, *a.up.T)]
    assert len(vectors) == 2 * 6 * 2
    extra = controller.extra_loss()
    assert extra is not None
    torch.testing.assert_close(extra, 0.3 * torch.stack([torch.var(v) for v in vectors]).mean())
    for a in adapters(m):
        a.down.copy_(a.down[:, :1].expand_as(a.down))
        a.up.copy_(a.up[:1].expand_as(a.up))
    extra = controller.extra_loss()
    assert extra is not None
    assert extra.item() == pytest.approx(0, abs=1e-12)
    off = dora(dem_weight=0.0)
    assert attach(off, adamw(off), total_steps=TOTAL).controllers["default"].extra_loss() is None


def test_dem_lowers_variance() -> None:
    m = dora(dem_weight=1.0)
    optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1.0)
    attach(m, optimizer, total_steps=TOTAL)

    def variances() -> list[float]:
        return [v.mean().item() for a in adapters(m) for v in (a.down.var(dim=1), a.up.var(dim=0))]

    before = variances()
    for _ in range(10):
        optimizer.zero_grad()
        optimizer.step()  # its gradient alone
    assert all(new < old for new, old in zip(variances(), before, strict=True))


# Faithfulness --------------------------------------------------------------------------------------------------------


def test_the_start() -> None:
    m = dora(base=nn.Sequential(nn.Linear(768, 64), nn.Tanh(), nn.Linear(64, 5)), r=12, target_r=8)
    a = adapters(m)[0]
    assert a.down.abs().max().item() == pytest.approx(0.08839, rel=0.01)
    assert a.up.abs().max().item() == pytest.approx(0.7071, rel=0.01)
    m = dora()
    x, y = batch(0)
    F.mse_loss(m(x), y).backward()
    for a in adapters(m):
        assert torch.count_nonzero(a.factors().delta()) == 0
        assert a.scaling == 8 / 6
        assert not a.down.grad.any()
        assert not a.up.grad.any()
        assert a.gate.grad.all()


def test_folding_drops_dead_components() -> None:
    m = dora()
    optimizer = adamw(m)
    attach(m, optimizer, total_steps=TOTAL)
    for t in range(1, TOTAL + 1):
        step(m, optimizer, t)
    assert sum(a.alive() for a in adapters(m)) == 8
    x, _ = batch(99)
    with torch.no_grad():
        wanted = m.eval()(x)
        plain = m.get_base_model()
        for layer in (plain[0], plain[2]):
            (a,) = layer.adapters(["default"])
            kept = a.factors().select(a.gate != 0)
            assert kept.rank == a.alive()
            assert kept.scale == 8 / 6
            x = F.linear(x, layer.weight + kept.delta(), layer.bias)
            x = torch.tanh(x) if layer is plain[0] else x
    torch.testing.assert_close(x, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("total", "interval"), [(40, 1), (60, 5), (33, 4)])
def test_a_transcript_of_the_authors_loop(total: int, interval: int) -> None:
    """Section 4(c), written down once more with ordinary tensors and an r × out × in score: the same run."""
    ours = dora(interval=interval, lora_alpha=4)
    optimizer = adamw(ours)
    attach(ours, optimizer, total_steps=total)
    down, up, c = ([getattr(a, n).detach().clone().requires_grad_() for a in adapters(ours)] for n in ("down", "up", "gate"))  # fmt: skip
    plain = ours.get_base_model()
    frozen = [(layer.weight.detach(), layer.bias.detach()) for layer in (plain[0], plain[2])]
    # parameters in the optimiser's own order, layer by layer
    theirs = torch.optim.AdamW([t for triple in zip(down, up, c, strict=True) for t in triple], lr=0.02)

    smooth, final = [torch.zeros(6), torch.zeros(6)], [torch.zeros(6, dtype=torch.bool)] * 2
    tau_max = int(total * 0.35)
    for t in range(1, total + 1):
        step(ours, optimizer, t)

        tau = int(t - 0.15 * total)
        x, y = batch(t)
        for k, (weight, bias) in enumerate(frozen):
            x = F.linear(x, weight + 4 / 6 * up[k] @ torch.diag(c[k]) @ down[k], bias)
            x = torch.tanh(x) if k == 0 else x
        vectors = [v for k in range(2) for v in (*down[k], *up[k].T)]
        penalty = 0.1 * torch.stack([v.var() for v in vectors]).mean() if tau <= tau_max else 0.0
        theirs.zero_grad()
        (F.mse_loss(x, y) + penalty).backward()
        theirs.step()
        with torch.no_grad():
            if tau > tau_max:
                for k in range(2):
                    c[k][final[k]] = 0.0
            else:
                for k in range(2):
                    smooth[k] = 0.9 * smooth[k] + 0.1 * brute_force(down[k], up[k], c[k])
                if tau >= 0 and (tau % interval == 0 or tau == tau_max):
                    count = int(12 * (6 - 4) / 6 * (tau / tau_max) ** 3)
                    theta = torch.cat(smooth).kthvalue(max(count, 1)).values
                    for k in range(2):
                        c[k][smooth[k] <= theta] = 0.0
                        if tau == tau_max:
                            final[k] = smooth[k] <= theta
        for k, a in enumerate(adapters(ours)):
            assert torch.equal(a.gate == 0, c[k] == 0), f"another mask at step {t}"
            for mine, his in ((a.down, down[k]), (a.up, up[k]), (a.gate, c[k])):
                torch.testing.assert_close(mine, his, rtol=1e-3, atol=1e-4)
    assert math.isclose(sum(a.alive() for a in adapters(ours)), 8)
