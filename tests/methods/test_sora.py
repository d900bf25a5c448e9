"""SoRA against section 1 of the specification: operator tables, trajectories, what the controller leaves alone."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from rankfold import PlainLoraConfig, SoraConfig, attach
from rankfold.control import Controller
from rankfold.host.linear_layer import AdaptedLinear
from rankfold.methods.sora import Sora, reference_threshold, soft_threshold
from rankfold.train.sparsify import thresholds

PROX = {"soft": soft_threshold, "reference": reference_threshold}


def model(config: Any, dtype: torch.dtype = torch.float32) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).to(dtype)
        torch.manual_seed(6)
        return get_peft_model(base, config)  # pyright: ignore[reportArgumentType, reportReturnType]


def sora(dtype: torch.dtype = torch.float32, **changes: Any) -> PeftModel:
    return model(SoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["0", "2"], **changes}), dtype)


def adapters(m: nn.Module) -> list[Any]:
    return [layer.adapters(["default"])[0] for layer in m.modules() if isinstance(layer, AdaptedLinear)]


def loss(m: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(16, 6, generator=g).to(dtype), torch.randn(16, 5, generator=g).to(dtype)
    return F.mse_loss(m(x), y)


def driven(**changes: Any) -> tuple[Sora, torch.optim.Optimizer, Controller]:
    """One float64 adapter whose gradients the test sets by hand."""
    m = sora(torch.float64, target_modules=["0"], **changes)
    optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1e-3)
    return adapters(m)[0], optimizer, attach(m, optimizer).controllers["default"]


def set_gate(adapter: Sora, values: list[float]) -> None:
    with torch.no_grad():
        adapter.gate.copy_(torch.tensor(values, dtype=torch.float64))


# The operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prox", "wanted"),
    [("soft", [0, 0, 0.05, 0.10, 0.15, 0.25]), ("reference", [0, 0.10, 0, 0.10, 0.15, 0.25])],
)
def test_operator_table(prox: str, wanted: list[float]) -> None:
    # in units of 1/20, where 0.1 and 0.2 are exact ties in binary too
    v = torch.tensor([1.0, 2, 3, 4, 5, 7], dtype=torch.float64)
    for sign in (1, -1):
        out = PROX[prox](sign * v, 2.0)
        torch.testing.assert_close(out, sign * 20 * torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-14)


def released(v: Tensor, xi: float) -> Tensor:
    """The released code's three statements, in their order."""
    v = v.clone()
    v[v > xi] -= xi
    v[v < -xi] += xi
    v[v.abs() < xi] = 0.0
    return v


def test_reference_operator_is_the_released_code() -> None:
    v = torch.linspace(-4, 4, 1025, dtype=torch.float64)  # steps of 1/128: ties at ξ and 2ξ among them
    for xi in (0.25, 0.5, 1.0):
        assert torch.equal(reference_threshold(v, xi), released(v, xi))
    for xi in (0.0, 0.3):
        v = torch.randn(1000, dtype=torch.float64)
        assert torch.equal(reference_threshold(v, xi), released(v, xi))


def test_shape_of_the_operators() -> None:
    v = torch.linspace(-1, 1, 401, dtype=torch.float64)
    for prox in PROX.values():
        assert torch.equal(prox(-v, 0.1), -prox(v, 0.1))
        assert torch.equal(prox(v, 0.0), v)
    slope = soft_threshold(v, 0.1).diff() / v.diff()
    assert slope.min() >= -1e-9
    assert slope.max() <= 1 + 1e-9
    around = torch.tensor([0.2 - 1e-9, 0.2 + 1e-9], dtype=torch.float64)
    torch.testing.assert_close(reference_threshold(around, 0.1), torch.tensor([0.0, 0.1], dtype=torch.float64), atol=1e-8, rtol=0)  # fmt: skip


def test_soft_threshold_minimises() -> None:
    """½(u − v)² + ξ|u| over a grid of u."""
    u = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    for v in torch.linspace(-0.9, 0.9, 37, dtype=torch.float64):
        best = u[(0.5 * (u - v) ** 2 + 0.1 * u.abs()).argmin()]
        assert abs(best - soft_threshold(v, 0.1)) <= 1e-4


@pytest.mark.parametrize(("start", "soft", "reference"), [(0.5, 1667, 1666), (1.0, 3334, 3333)])
def test_an_undriven_gate_dies(start: float, soft: int, reference: int) -> None:
    for prox, steps in ((soft_threshold, soft), (reference_threshold, reference)):
        g, count = torch.tensor(start, dtype=torch.float64), 0
        while g != 0:
            g, count = prox(g, 3e-4), count + 1
        assert count == steps


def test_an_undriven_gate_shrinks_in_training_too() -> None:
    adapter, optimizer, _ = driven(threshold=0.25)
    set_gate(adapter, [0.5, -0.6, 1.1, 0.0])
    for _ in range(3):
        optimizer.step()
    assert adapter.gate.tolist() == pytest.approx([0, 0, 0.35, 0])
    assert adapter.alive() == 1


def test_schedules_of_the_threshold() -> None:
    assert thresholds(0, 7e-4, 7) == pytest.approx(
        [0, 1.1667e-4, 2.3333e-4, 3.5e-4, 4.6667e-4, 5.8333e-4, 7e-4], rel=1e-4
    )
    assert thresholds(1e-4, 7e-4, 4, "log_linear") == pytest.approx([1e-4, 3.0004e-4, 5.0004e-4, 7e-4], rel=1e-5)
    assert thresholds(1e-4, 7e-4, 4, "exp_linear") == pytest.approx([1e-4, 1.9129e-4, 3.6593e-4, 7e-4], rel=1e-4)
    for bad in ((0, 1, 1), (1, 1, 3), (2, 1, 3), (-1, 1, 3), (0, 1, 3, "exp_linear"), (0, 1, 3, "cubic")):
        with pytest.raises(ValueError, match="thresholds"):
            thresholds(*bad)


# The gate's own optimiser --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "last"), [("soft", 0.0002), ("reference", 0.0)])
def test_golden_trajectory(preset: str, last: float) -> None:
    adapter, optimizer, _ = driven(threshold=3e-4, prox=preset)
    set_gate(adapter, [0.5, -0.02, 0, 0.0011])
    grads = [[0.1, -0.3, 0.2, 0], [0.1, 0, 0.2, 0], [-0.1, 0.3, 0.2, 0]]
    wanted = [
        [0.498700316, -0.018700105, -0.000699842, 0.0008],
        [0.497400540, -0.017730118, -0.001399730, 0.0005],
        [0.496838595, -0.017515979, -0.002099639, last],
    ]
    for grad, values in zip(grads, wanted, strict=True):
        adapter.gate.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
        assert adapter.gate.tolist() == pytest.approx(values, abs=6e-10)
        assert adapter.gate.grad.tolist() == grad  # still there for whoever logs it


def test_without_threshold_it_is_adamw() -> None:
    """ε 1e-6 beside the square root of the second moment that is *not* bias-corrected, as HF's old AdamW had it."""
    adapter, optimizer, _ = driven(threshold=0.0)
    start = adapter.gate.detach().clone()
    m = v = torch.zeros(4, dtype=torch.float64)
    for t in range(1, 6):
        grad = torch.randn(4, dtype=torch.float64)
        adapter.gate.grad = grad.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        start = start - 1e-3 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (v.sqrt() + 1e-6)
    torch.testing.assert_close(adapter.gate.detach(), start, rtol=1e-12, atol=0)


def test_steps_without_a_gradient_do_not_count() -> None:
    """As in torch's Adam: an expert that no token went to for 40 steps then moves by one learning rate, and not by three."""
    adapter, optimizer, _ = driven(threshold=0.0)
    start, grad = adapter.gate.detach().clone(), torch.tensor([1.0, -2.0, 3.0, -4.0], dtype=torch.float64)
    for _ in range(40):
        adapter.gate.grad = None
        optimizer.step()
    assert torch.equal(adapter.gate.detach(), start)
    adapter.gate.grad = grad
    optimizer.step()
    torch.testing.assert_close(adapter.gate.detach(), start - 1e-3 * grad.sign(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_weight_decay_never_touches_gates(make: Any) -> None:
    m = sora(threshold=0.0)
    gates = [a.gate.detach().clone() for a in adapters(m)]
    downs = [a.down.detach().clone() for a in adapters(m)]
    optimizer = make([p for p in m.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    attach(m, optimizer)
    (0 * loss(m)).backward()
    for _ in range(3):
        optimizer.step()
    for adapter, gate, down in zip(adapters(m), gates, downs, strict=True):
        assert torch.equal(adapter.gate, gate)
        assert not torch.equal(adapter.down, down)
        assert adapter.gate not in optimizer.state
        assert adapter.gate.dtype == torch.float32


def test_learning_rate_is_the_group_s_and_follows_its_schedule() -> None:
    m = sora(threshold=0.0)
    first, second = adapters(m)
    groups = [{"params": list(first.parameters()), "lr": 0.1}, {"params": list(second.parameters()), "lr": 0.01}]
    optimizer = torch.optim.AdamW(groups)
    attach(m, optimizer)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(3):
        before = [a.gate.detach().clone() for a in (first, second)]
        for a in (first, second):
            a.gate.grad = torch.ones(4)
        optimizer.step()
        rate.step()
        for a, old, lr in zip((first, second), before, (0.1, 0.01), strict=True):
            torch.testing.assert_close(old - a.gate, torch.full((4,), lr * 0.5**step), rtol=1e-3, atol=0)


def test_gate_lr_is_constant() -> None:
    adapter, optimizer, _ = driven(threshold=0.0, gate_lr=0.25)
    before = adapter.gate.detach().clone()
    adapter.gate.grad = torch.ones(4, dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(before - adapter.gate, torch.full((4,), 0.25, dtype=torch.float64), rtol=1e-4, atol=0)


def test_threshold_times_lr() -> None:
    adapter, optimizer, _ = driven(threshold=100.0, threshold_times_lr=True)  # × 1e-3
    set_gate(adapter, [0.5, -0.5, 0.05, 0.0])
    optimizer.step()
    assert adapter.gate.tolist() == pytest.approx([0.4, -0.4, 0, 0])


def test_a_gate_that_no_group_has_is_refused() -> None:
    m = sora()
    matrices = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad and p.ndim == 2])
    with pytest.raises(ValueError, match=r"holds down, up but not gate"):
        attach(m, matrices)


def test_the_loop_s_clipping_reaches_gates() -> None:
    m = sora(threshold=0.0)
    optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad])
    controller = attach(m, optimizer).controllers["default"]
    for p in m.parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, 10.0)
    nn.utils.clip_grad_norm_(m.parameters(), 1.0)
    clipped = [a.gate.grad.clone() for a in adapters(m)]
    optimizer.step()
    for moment, grad in zip(controller.state["m"], clipped, strict=True):
        torch.testing.assert_close(moment, 0.1 * grad)


# The reference preset ------------------------------------------------------------------------------------------------


def test_presets() -> None:
    paper, reference = SoraConfig(), SoraConfig(preset="reference")
    assert (paper.prox, paper.l1, paper.clip, paper.threshold_times_lr) == ("soft", 0.0, None, False)
    assert (reference.prox, reference.l1, reference.clip) == ("reference", 10.0, 0.1)
    assert SoraConfig(preset="reference", l1=1e-3).l1 == 1e-3
    for bad in ({"preset": "x"}, {"prox": "hard"}, {"threshold": -1}, {"l1": -1}, {"clip": 0}, {"gate_lr": 0}):
        with pytest.raises(ValueError, match=f"SoraConfig: {next(iter(bad))}="):
            SoraConfig(**bad)


def test_l1_is_the_mean_over_the_model_and_is_clipped_with_the_rest() -> None:
    """λ₁ = 10 over p gates has norm 10/√p, more than the clip of 0.1 whatever the task says."""
    m = sora(preset="reference", threshold=0.0)
    optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad])
    controller = attach(m, optimizer).controllers["default"]
    extra = controller.extra_loss()
    assert extra is not None
    gates = [a.gate for a in adapters(m)]
    torch.testing.assert_close(extra, 10 * torch.cat([g.abs() for g in gates]).sum() / 8)
    grads = torch.cat(torch.autograd.grad(extra, gates))
    torch.testing.assert_close(grads.norm(), torch.tensor(10 / math.sqrt(8)))

    optimizer.zero_grad()
    loss(m).backward()
    task = {p: p.grad.clone() for p in m.parameters() if p.requires_grad and p.grad is not None}
    for a in adapters(m):
        task[a.gate] += 10 / 8 * a.gate.detach().sign()
    whole = torch.cat([g.flatten() for g in task.values()]).norm()
    optimizer.step()
    for p, grad in task.items():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, grad * 0.1 / whole, rtol=1e-4, atol=1e-8)


# Faithfulness --------------------------------------------------------------------------------------------------------


def test_the_start() -> None:
    m = sora()
    for a in adapters(m):
        assert a.gate.dtype == torch.float32
        assert torch.count_nonzero(a.factors().delta()) == 0
        assert a.down.abs().max() <= 1 / math.sqrt(a.site.in_features)
        assert a.scaling == 8 / 4
    loss(m).backward()
    for a in adapters(m):
        assert not a.down.grad.any()
        assert not a.gate.grad.any()
        assert a.up.grad.any()


def test_gates_start_as_a_standard_normal() -> None:
    gates = torch.cat([a.gate for a in adapters(sora(r=5000))]).detach()
    assert abs(gates.mean()) < 0.04
    assert abs(gates.std() - 1) < 0.04


@pytest.mark.parametrize("prox", ["soft", "reference"])
def test_folding_drops_dead_gates(prox: str) -> None:
    m = sora(threshold=0.05, prox=prox)
    optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.01)
    attach(m, optimizer)
    for step in range(20):
        optimizer.zero_grad()
        loss(m, step).backward()
        optimizer.step()
    with torch.no_grad():
        adapters(m)[0].gate.zero_()  # a matrix with no rank left, too
    assert 0 < adapters(m)[1].alive() < 4
    x = torch.randn(7, 6)
    with torch.no_grad():
        y = m.eval()(x)
        plain = m.get_base_model()
        for layer in (plain[0], plain[2]):
            (a,) = layer.adapters(["default"])
            kept = a.factors().select(a.gate != 0)
            assert kept.rank == a.alive()
            assert kept.scale == 8 / 4  # of the start rank, not of what is left
            again = kept.select(kept.gate != 0)
            assert torch.equal(again.up, kept.up)
            x = F.linear(x, layer.weight + kept.delta(), layer.bias)
            x = torch.tanh(x) if layer is plain[0] else x
    torch.testing.assert_close(y, x, rtol=0, atol=1e-6)


def test_constant_gates_of_one_are_a_plain_lora() -> None:
    """ξ = 0, λ₁ = 0, g ≡ 1 frozen: bit for bit, trained."""
    ours = sora(threshold=0.0)
    lora = model(PlainLoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
    for a, b in zip(adapters(ours), adapters(lora), strict=True):
        with torch.no_grad():
            a.gate.fill_(1.0)
            b.down.copy_(a.down)
            b.up.copy_(a.up)
        a.gate.requires_grad_(False)
    for m in (ours, lora):
        optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.01)
        attach(m, optimizer)
        for step in range(10):
            optimizer.zero_grad()
            loss(m, step).backward()
            optimizer.step()
    for a, b in zip(adapters(ours), adapters(lora), strict=True):
        assert torch.equal(a.gate, torch.ones(4))
        assert torch.equal(a.up, b.up)
        assert torch.equal(a.down, b.down)


def test_larger_thresholds_leave_fewer_gates() -> None:
    left = []
    for xi in (0.0, 0.005, 0.02, 0.2):
        m = sora(r=16, threshold=xi)
        optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.01)
        attach(m, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the last one kills all
            for step in range(60):
                optimizer.zero_grad()
                loss(m, step).backward()
                optimizer.step()
        left.append(sum(a.alive() for a in adapters(m)))
    assert left == sorted(left, reverse=True)
    assert left[0] == 32
    assert left[-1] == 0
    assert len(set(left)) == 4


def test_all_gates_dead_is_said_once() -> None:
    m = sora(threshold=10.0)
    optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad])
    handle = attach(m, optimizer)
    loss(m).backward()
    with pytest.warns(UserWarning, match="every gate is zero after step 1.*threshold=10"):
        optimizer.step()
    optimizer.step()  # and is no error
    assert handle.ranks() == {"default": {"0": 0, "2": 0}}
    x = torch.randn(3, 6)
    with m.disable_adapter():
        base = m(x)
    torch.testing.assert_close(m(x), base)
