"""AdaLoRA against section 3 of the specification, and against peft.AdaLoraModel on the same gradients."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from rankfold import AdaSvdConfig, attach
from rankfold.host.linear_layer import AdaptedLinear
from rankfold.methods.adalora import budget, importance
from rankfold.methods.gated import lowest


class Toy(nn.Module):
    """Its output has a `loss`: PEFT regularises no other."""

    def __init__(self, wide: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, wide), nn.Linear(wide, 5)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        out = self.b(torch.tanh(self.a(x)))
        return SimpleNamespace(loss=F.mse_loss(out, y), out=out)


def model(config: Any, dtype: torch.dtype = torch.float32, base: Any = Toy) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = base().to(dtype)
        torch.manual_seed(6)
        return get_peft_model(made, config)  # pyright: ignore[reportArgumentType, reportReturnType]


def ada(dtype: torch.dtype = torch.float32, base: Any = Toy, **changes: Any) -> PeftModel:
    defaults = {"r": 4, "target_r": 2, "lora_alpha": 8, "target_modules": ["a", "b"]}
    return model(AdaSvdConfig(**{**defaults, **changes}), dtype, base)


def adapters(m: nn.Module) -> list[Any]:
    return [layer.adapters(["default"])[0] for layer in m.modules() if isinstance(layer, AdaptedLinear)]


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=g).to(dtype), torch.randn(16, 5, generator=g).to(dtype)


def adamw(m: nn.Module, lr: float = 0.01) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=lr)


def step(m: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    optimizer.zero_grad()
    m(*batch(t)).loss.backward()
    optimizer.step()


# The budget ----------------------------------------------------------------------------------------------------------

GOLDEN = {"b0": 864, "bT": 576, "tinit": 500, "tfinal": 1500, "total": 3000, "deltaT": 10}


def test_budget_golden() -> None:
    wanted = {0: 864, 500: 864, 501: 863, 510: 855, 750: 697, 1000: 612, 1250: 580, 1490: 576, 1500: 576, 1501: 576}
    assert {t: budget(t, **GOLDEN)[0] for t in wanted} == wanted
    masks = {0: False, 500: False, 501: False, 510: True, 1000: True, 1499: False, 1500: True, 1501: True, 2999: True}
    assert {t: budget(t, **GOLDEN)[1] for t in masks} == masks
    course = [budget(t, **GOLDEN)[0] for t in range(3000)]
    assert course == sorted(course, reverse=True)
    assert course[-1500:] == [576] * 1500


@pytest.mark.parametrize("tfinal", [0, 1, 2, 7])
@pytest.mark.parametrize("deltaT", [1, 4, 50])
def test_the_last_step_always_cuts_to_the_budget(tfinal: int, deltaT: int) -> None:
    for t in range(29, 40):  # and those behind it, where training is longer than `total_step`
        assert budget(t, 8, 4, 2, tfinal, 30, deltaT) == (4, True)


@pytest.mark.parametrize(
    ("tinit", "tfinal", "deltaT"), [(5, 8, 1), (5, 8, 3), (0, 0, 1), (0, 0, 7), (3, 1, 4), (3, 2, 4)]
)
def test_exactly_the_budget_is_left(tinit: int, tfinal: int, deltaT: int) -> None:
    total = 30
    m = ada(tinit=tinit, tfinal=tfinal, deltaT=deltaT)
    optimizer = adamw(m)
    controller = attach(m, optimizer, total_steps=total).controllers["default"]
    back = frozen = 0
    for t in range(total):
        before = [a.gate != 0 for a in adapters(m)]
        step(m, optimizer, t)
        left = sum(a.alive() for a in adapters(m))
        b, now = budget(t, 8, 4, tinit, tfinal, total, deltaT)
        if now:
            assert left == b, t
        elif t:
            back += left > sum(int(mask.sum()) for mask in before)
        if t > total - tfinal + 1:  # both this step and the one before it masked with frozen averages
            frozen += 1
            assert all(torch.equal(a.gate != 0, mask) for a, mask in zip(adapters(m), before, strict=True))
        assert controller.finished() == (t + 1 >= min(total, total - tfinal + 2))
    assert sum(a.alive() for a in adapters(m)) == 4
    assert (back > 0) == (deltaT > 1)  # a triplet dropped between two cuts may come back
    assert frozen == max(tfinal - 2, 0)


def test_masks_touch_only_the_singular_values() -> None:
    m = ada(orth_reg_weight=0.0)
    optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.0)
    attach(m, optimizer, total_steps=10)
    with torch.no_grad():
        for a in adapters(m):
            a.gate.normal_()
    before = [(a.up.detach().clone(), a.down.detach().clone(), a.gate.detach().clone()) for a in adapters(m)]
    for t in range(5):
        step(m, optimizer, t)
    assert sum(a.alive() for a in adapters(m)) < 8
    for a, (up, down, gate) in zip(adapters(m), before, strict=True):
        assert torch.equal(a.up, up)
        assert torch.equal(a.down, down)
        assert torch.equal(a.gate[a.gate != 0], gate[a.gate != 0])


def test_ties_are_broken_by_position() -> None:
    scores = [torch.tensor([0.0, 2.0, 0.0]), torch.tensor([0.0, 1.0])]
    assert [m.tolist() for m in lowest(scores, 2)] == [[True, False, True], [False, False]]
    assert [m.tolist() for m in lowest(scores, 0)] == [[False] * 3, [False] * 2]
    assert [m.tolist() for m in lowest(scores, 5)] == [[True] * 3, [True] * 2]


def test_a_layer_without_gradient_keeps_its_averages() -> None:
    m = ada(orth_reg_weight=0.0)
    optimizer = adamw(m)
    controller = attach(m, optimizer, total_steps=10).controllers["default"]
    for name in ("up", "down", "gate"):
        getattr(adapters(m)[0], name).requires_grad_(False)
    step(m, optimizer, 0)
    assert not any(t.any() for t in controller.state["I"][0].values())
    assert controller.state["I"][1]["up"].shape == (5, 4)


# Scores --------------------------------------------------------------------------------------------------------------


def test_ema_golden() -> None:
    w, grad = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    i_bar, u_bar = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    s = importance(i_bar, u_bar, w, grad, 0.85, 0.85)
    torch.testing.assert_close(s, 0.019125 * (w * grad) ** 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(i_bar, 0.15 * (w * grad).abs())
    torch.testing.assert_close(u_bar, 0.15 * 0.85 * (w * grad).abs())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_importance_of_half_precision_is_not_rounded_to_zero(dtype: torch.dtype) -> None:
    w, grad = torch.tensor([0.01, 0.02]).to(dtype), torch.tensor([1e-6, 2e-6]).to(dtype)
    i_bar = torch.zeros(2)
    importance(i_bar, torch.zeros(2), w, grad, 0.85, 0.85)
    torch.testing.assert_close(i_bar, 0.15 * w.float() * grad.float(), rtol=1e-6, atol=0)


def test_score_golden() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2)

    m = ada(torch.float64, One, r=3, target_modules=["a"], orth_reg_weight=0.0, tinit=5)
    (a,) = adapters(m)
    optimizer = torch.optim.SGD(a.parameters(), lr=0.0)
    controller: Any = attach(m, optimizer, total_steps=10).controllers["default"]

    def tensor(values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    with torch.no_grad():
        a.up.copy_(tensor([[0.1, 0.2, -0.3], [0.4, -0.5, 0.6]]))
        a.gate.copy_(tensor([0.05, -0.1, 0.2]))
        a.down.copy_(tensor([[1, 2], [3, -1], [0.5, 0.5]]))
    wanted = [[0.00670570, 0.01381781, 0.01506859], [0.05160039, 0.10632807, 0.11595278]]
    for times, scores in zip((1, 2), wanted, strict=True):
        a.up.grad = times * tensor([[1, 1, 1], [2, 2, 2]])
        a.gate.grad = times * tensor([0.5, 0.5, 0.1])
        a.down.grad = times * tensor([[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]])
        optimizer.step()
        assert controller._scores()[0].tolist() == pytest.approx(scores, abs=6e-9)


# The regulariser -----------------------------------------------------------------------------------------------------


def test_orthogonality_at_the_start() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(768, 768)

    (a,) = adapters(ada(base=Wide, r=12, target_r=8, target_modules=["a"]))
    q = a.down.detach()
    assert torch.linalg.norm(q @ q.T - torch.eye(12)).item() == pytest.approx(
        (1 - 4e-4 * 768) * math.sqrt(12), rel=0.02
    )


def test_orthogonality_is_learned_early() -> None:
    """The squared error falls to about 1e-3 at γ = 0.1 (the paper's figure), while the task goes on."""
    m = ada(base=lambda: Toy(48), r=4, target_r=4, orth_reg_weight=0.1)
    optimizer = adamw(m)
    attach(m, optimizer, total_steps=500)

    def error() -> float:
        eye = torch.eye(4)
        pairs = [g for a in adapters(m) for g in (a.up.T @ a.up, a.down @ a.down.T)]
        return max(float(((g - eye) ** 2).sum().detach()) for g in pairs)

    assert error() > 3
    for t in range(350):
        step(m, optimizer, t % 8)
    assert error() < 3e-3


def test_the_regulariser_is_the_code_s() -> None:
    m = ada(orth_reg_weight=0.3)
    extra = attach(m, adamw(m), total_steps=10).controllers["default"].extra_loss()
    assert extra is not None
    eye = torch.eye(4)
    norms = [torch.linalg.norm(g - eye) for a in adapters(m) for g in (a.up.T @ a.up, a.down @ a.down.T)]
    torch.testing.assert_close(extra, 0.3 * sum(norms) / 4)
    off = ada(orth_reg_weight=0.0)
    assert attach(off, adamw(off), total_steps=10).controllers["default"].extra_loss() is None


# Faithfulness --------------------------------------------------------------------------------------------------------


def test_the_start() -> None:
    m = ada(r=200, target_r=100)
    for a in adapters(m):
        assert torch.count_nonzero(a.factors().delta()) == 0
        assert a.scaling == 8 / (200 + 1e-5)
        for t in (a.up, a.down):
            assert t.std().item() == pytest.approx(0.02, rel=0.15)
    m(*batch(0)).loss.backward()
    for a in adapters(m):
        assert a.gate.grad.all()
        assert not a.up.grad.any()
        assert not a.down.grad.any()


def test_folding_keeps_the_start_rank_s_scale() -> None:
    m = ada(tfinal=5)
    optimizer = adamw(m)
    attach(m, optimizer, total_steps=20)
    for t in range(20):
        step(m, optimizer, t)
    x, y = batch(99)
    with torch.no_grad():
        wanted = m.eval()(x, y).out
        plain = m.get_base_model()
        for layer in (plain.a, plain.b):
            (a,) = layer.adapters(["default"])
            kept = a.factors().select(a.gate != 0)
            assert kept.rank == a.alive()
            assert kept.scale == 8 / (4 + 1e-5)
            x = F.linear(x, layer.weight + kept.delta(), layer.bias)
            x = torch.tanh(x) if layer is plain.a else x
    torch.testing.assert_close(x, wanted, rtol=0, atol=1e-6)


def test_rslora_is_refused() -> None:
    with pytest.raises(ValueError, match="use_rslora=True must be false"):
        AdaSvdConfig(use_rslora=True)


@pytest.mark.parametrize(("tinit", "tfinal", "deltaT"), [(5, 6, 3), (0, 0, 1), (3, 12, 2)])
def test_peft_on_the_same_gradients(tinit: int, tfinal: int, deltaT: int) -> None:
    """Same masks and the same ΔW at every step; and PEFT's own gradient, its regulariser's included, is ours."""
    total = 30
    shared = {"target_modules": ["a", "b"], "lora_alpha": 8, "target_r": 2, "tinit": tinit, "tfinal": tfinal}
    shared |= {"deltaT": deltaT, "orth_reg_weight": 0.1}
    ours = ada(torch.float64, **shared)
    theirs = model(AdaLoraConfig(init_r=4, total_step=total, **shared), torch.float64)
    pairs = []  # our adapter, their layer, and (our tensor, their tensor, how ours becomes theirs)
    for a, name in zip(adapters(ours), ("a", "b"), strict=True):
        layer = getattr(theirs.get_base_model(), name)
        layer.ranknum["default"].requires_grad_(False)  # PEFT 0.21.2 trains and decays it, and does not save it
        lora = [getattr(layer, part)["default"] for part in ("lora_A", "lora_B", "lora_E")]
        pairs.append((a, layer, list(zip((a.down, a.up, a.gate), lora, strict=True))))
        with torch.no_grad():
            for mine, his in pairs[-1][2]:
                his.copy_(mine.reshape(his.shape))
    first, second = adamw(ours, 0.02), adamw(theirs, 0.02)
    controller = attach(ours, first, total_steps=total).controllers["default"]
    cuts = 0
    for t in range(total):
        x, y = batch(t, torch.float64)
        first.zero_grad()
        ours(x, y).loss.backward()
        first.step()  # adds the regulariser's gradient, steps and masks
        second.zero_grad()
        theirs.base_model(x, y).loss.backward()  # PeftModel.forward of no task would leave the regulariser out
        for _, _, tensors in pairs:
            for mine, his in tensors:
                torch.testing.assert_close(his.grad, mine.grad.reshape(his.shape), rtol=1e-9, atol=1e-13)
                his.grad.copy_(mine.grad.reshape(his.shape))
        second.step()
        theirs.base_model.update_and_allocate(t)
        for a, layer, tensors in pairs:
            gate, his = tensors[-1]
            assert torch.equal(gate != 0, his.view(-1) != 0), f"another mask at step {t}"
            for mine, his in tensors:
                torch.testing.assert_close(mine, his.reshape(mine.shape), rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(a.factors().delta(), layer.get_delta_weight("default"), rtol=1e-12, atol=1e-15)
        cuts += sum(a.alive() for a in adapters(ours)) < 8
    assert cuts
    assert controller.step == total
