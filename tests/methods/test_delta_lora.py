"""Delta-LoRA: golden values, the telescoping sum, its equals among plain LoRAs, the literal mode, resuming."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from models import LLAMA
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from test_table import det
from torch import Tensor, nn

from rankfold import DeltaLoraConfig, PlainLoraConfig, attach
from rankfold.fold import fold_model


def adapted(config: Any, weight: Tensor | None = None) -> tuple[PeftModel, Any]:
    """One 5×7 matrix in float64 with the adapter."""
    config.target_modules = ["0"]
    model: Any = get_peft_model(nn.Sequential(nn.Linear(7, 5, bias=False)), config).double()  # pyright: ignore[reportArgumentType]
    layer = model.base_model.model[0]
    if weight is not None:
        layer.base_layer.weight.data = weight.clone()
    return model, layer.lowrank_adapters["default"]


def put(adapter: Any, down: Tensor, up: Tensor) -> None:
    with torch.no_grad():
        adapter.down.copy_(down)
        adapter.up.copy_(up)


modes = pytest.mark.parametrize("literal", [False, True], ids=["closed", "literal"])


@modes
def test_golden_static(literal: bool) -> None:
    """Factors that move as the golden values say; three of the five transitions change W."""
    model, adapter = adapted(DeltaLoraConfig(r=2, lora_alpha=3, start_step=1, literal=literal))
    states = [(det((2, 7), 0.1 * t, 0.6, 0.9), det((5, 2), 0.2 * t, 0.5, 0.4)) for t in range(6)]
    put(adapter, *states[0])
    optimizer = torch.optim.SGD([adapter.down, adapter.up], lr=1.0)
    attach(model, optimizer, total_steps=5)
    for t in range(5):
        adapter.down.grad, adapter.up.grad = (
            adapter.down.detach() - states[t + 1][0],
            adapter.up.detach() - states[t + 1][1],
        )
        optimizer.step()
        if t <= 1:
            torch.testing.assert_close(adapter.factors().delta(), adapter.live().delta(), rtol=0, atol=1e-12)
    written = (adapter.factors().delta() - adapter.live().delta()).sum().item()
    assert written == pytest.approx(-0.9325520191, abs=1e-9)
    assert written != pytest.approx(-0.1992908665, abs=1e-3)  # the product of the differences


X, T, W0 = det((16, 7), 0.5, 0.7, 1.3), det((16, 5), 0.9, 1.1, 0.4), det((5, 7), 1, 0.3, 0.2)


def trained(config: Any, steps: int = 200, **options: Any) -> tuple[Any, list[Tensor]]:
    """The adapter, and the effective weight after every step."""
    model, adapter = adapted(config, W0)
    put(adapter, det((2, 7), 0.4, 0.6, 0.9), torch.zeros(5, 2))
    optimizer = torch.optim.AdamW(
        [adapter.down, adapter.up], **{"lr": 0.01, "weight_decay": 0.01, "eps": 1e-30, **options}
    )
    attach(model, optimizer, total_steps=steps)
    weights = []
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - T).square().mean().backward()
        optimizer.step()
        weights.append((W0 + adapter.factors().delta()).detach())
    return adapter, weights


@modes
def test_golden_trained(literal: bool) -> None:
    _, weights = trained(DeltaLoraConfig(r=2, lora_alpha=3, start_step=20, literal=literal))
    end = weights[-1]
    assert end.sum().item() == pytest.approx(7.1797551391, abs=1e-6)
    assert (end - W0).norm().item() == pytest.approx(3.5593922267, abs=1e-6)
    assert torch.linalg.matrix_rank(end - W0) == 4  # 2r, whatever the number of steps


def test_the_sum_of_the_increments_telescopes() -> None:
    closed = trained(DeltaLoraConfig(r=2, start_step=5), 60)[1]
    literal = trained(DeltaLoraConfig(r=2, start_step=5, literal=True), 60)[1]
    torch.testing.assert_close(closed, literal, rtol=1e-12, atol=1e-12)


def test_it_is_a_lora_of_another_scale_behind_the_snapshot() -> None:
    """LoRA at (1 + λ)s from step κ on, with an offset, and with the factors' gradients divided by 1 + λ."""
    start, wanted = 20, trained(DeltaLoraConfig(r=2, lora_alpha=3, start_step=20), 60)[1]
    up = torch.zeros(5, 2, dtype=torch.float64, requires_grad=True)
    down = det((2, 7), 0.4, 0.6, 0.9).requires_grad_()
    optimizer = torch.optim.AdamW([down, up], lr=0.01, weight_decay=0.01, eps=1e-30)
    scale, offset = 1.5, torch.zeros(5, 7, dtype=torch.float64)
    for step in range(60):
        if step == start + 1:
            scale, offset = 3 * 1.5, -2 * 1.5 * (up @ down).detach()
        optimizer.zero_grad()
        (X @ (W0 + scale * up @ down + offset).T - T).square().mean().backward()
        for p in (down, up):
            assert p.grad is not None
            p.grad /= scale / 1.5
        optimizer.step()
        torch.testing.assert_close(W0 + scale * up @ down + offset, wanted[step], rtol=1e-10, atol=1e-10)


def test_without_weight_or_before_its_start_it_is_lora() -> None:
    lora = trained(PlainLoraConfig(r=2), 30)[1]
    assert all(
        torch.equal(a, b) for a, b in zip(trained(DeltaLoraConfig(r=2, start_step=28), 30)[1][:28], lora, strict=False)
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(trained(DeltaLoraConfig(r=2, delta_weight=0.0, start_step=5), 30)[1], lora, strict=True)
    )


def test_accumulated_gradients_change_w_once() -> None:
    model, adapter = adapted(DeltaLoraConfig(r=2, start_step=0, literal=True), W0)
    optimizer = torch.optim.SGD([adapter.down, adapter.up], lr=0.1)
    attach(model, optimizer, total_steps=2)
    for micro in range(8):
        before = adapter.written.clone()
        (model(X) - T).square().mean().backward()
        if micro % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(before, adapter.written) == (micro != 7)


@modes
def test_resumes_bit_for_bit_from_every_step(literal: bool) -> None:
    config = DeltaLoraConfig(r=2, start_step=2, literal=literal)

    def start(seed: int) -> tuple[PeftModel, Any, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model, adapter = adapted(copy.deepcopy(config), W0)
        return model, adapter, torch.optim.AdamW([adapter.down, adapter.up], lr=0.05)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        (model(X) - T).square().mean().backward()
        optimizer.step()

    model, adapter, optimizer = start(1)
    attach(model, optimizer, total_steps=6)
    files = []
    for _ in range(6):
        buffer = io.BytesIO()
        torch.save({"adapter": get_peft_model_state_dict(model), "optimizer": optimizer.state_dict()}, buffer)
        files.append(buffer.getvalue())
        train(model, optimizer)
    for at in range(1, 6):
        file = torch.load(io.BytesIO(files[at]), weights_only=True)
        again, other, optimizer = start(9)
        set_peft_model_state_dict(again, file["adapter"])
        optimizer.load_state_dict(file["optimizer"])
        attach(again, optimizer, total_steps=6)
        for _ in range(at, 6):
            train(again, optimizer)
        assert torch.equal(other.factors().delta(), adapter.factors().delta())


@modes
def test_folds_to_rank_2r_on_the_untouched_base(literal: bool, tmp_path: Any) -> None:
    LLAMA.build().save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    config = DeltaLoraConfig(r=2, start_step=1, literal=literal, target_modules=["q_proj", "down_proj"])
    model: Any = get_peft_model(LLAMA.build(), config)  # pyright: ignore[reportArgumentType]
    config.base_model_name_or_path = str(tmp_path / "base")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    attach(model, optimizer, total_steps=6)
    for _ in range(6):
        optimizer.zero_grad()
        LLAMA.loss(model).backward()
        optimizer.step()
    report = fold_model(model.eval(), tmp_path / "out", pad="none", rank=4 if literal else None)
    assert report.needed_rank == 4
    assert report.worst.frobenius < 1e-5
    folded = PeftModel.from_pretrained(LLAMA.build(), str(tmp_path / "out")).eval()  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(LLAMA.out(folded), LLAMA.out(model), rtol=1e-4, atol=1e-5)


def test_the_literal_mode_in_float32_is_a_whole_adapter(tmp_path: Any) -> None:
    """Its dense matrix is saved, copied, merged and unmerged with the factors, and switched off with them."""

    def build() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(7, 5))

    config = DeltaLoraConfig(r=2, start_step=0, literal=True, target_modules=["0"])
    model: Any = get_peft_model(build(), config)  # pyright: ignore[reportArgumentType]
    layer = model.base_model.model[0]
    x, base = X.float(), layer.base_layer.weight.detach().clone()
    before = model(x)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    attach(model, optimizer, total_steps=4)
    for _ in range(4):
        optimizer.zero_grad()
        (model(x) - T.float()).square().mean().backward()
        optimizer.step()
    assert layer.lowrank_adapters["default"].written.any()
    assert torch.equal(layer.base_layer.weight, base)  # the base is never written
    wanted = model.eval()(x).detach()
    with model.disable_adapter():
        torch.testing.assert_close(model(x), before)
    model.save_pretrained(tmp_path)
    again: Any = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(again(x), wanted)
    assert torch.equal(copy.deepcopy(model)(x), wanted)
    again.base_model.merge_adapter()
    torch.testing.assert_close(again(x), wanted)
    again.base_model.unmerge_adapter()
    assert torch.equal(again.base_model.model[0].base_layer.weight, base)
    torch.testing.assert_close(again.merge_and_unload()(x), wanted)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lora_dropout=0.1 must be 0"):
        DeltaLoraConfig(lora_dropout=0.1)
    model, adapter = adapted(DeltaLoraConfig(start_step=9))
    optimizer = torch.optim.SGD([adapter.down, adapter.up], lr=0.1)
    with pytest.raises(
        ValueError, match=r"start_step=9 leaves no step that changes W in a run of 10; choose start_step <= 8"
    ):
        attach(model, optimizer, total_steps=10)
    model, adapter = adapted(DeltaLoraConfig(start_step=0, literal=True))
    model.bfloat16()
    with pytest.raises(
        ValueError, match=r"literal=True adds up small increments, which torch.bfloat16 would lose at 0"
    ):
        attach(model, torch.optim.SGD([adapter.down, adapter.up], lr=0.1), total_steps=10)
