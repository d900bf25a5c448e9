"""SD-LoRA: golden values, several tasks one after another and all that must survive them, the rank schedule, KD."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import moe_models
import pytest
import torch
from models import LLAMA
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from table import (
    SD_LORA,
    Row,
    adapt,
    adapter_buffers,
    adapter_parameters,
    assert_same,
    fit,
    layers,
    second,
    snapshot,
    stir,
    stock_lora,
)
from test_table import det
from torch import nn

from rankfold import SdLoraConfig
from rankfold.fold import fold_model
from rankfold.host import registry
from rankfold.kernel.factors import Factors
from rankfold.methods.sd_lora import absorb, next_task
from rankfold.methods.sd_lora_adapter import SdLora
from rankfold.methods.sd_lora_adapter import fit as fit_by_past


def row(**fields: Any) -> Row:
    return Row(SD_LORA, "own", {"r": 3, **fields})


def after_tasks(tasks: int = 3, **fields: Any) -> PeftModel:
    """A small Llama whose adapter has been trained on `tasks` tasks, each two steps; the last one is the current."""
    model = adapt(LLAMA, row(**fields), live=False)
    for task in range(tasks):
        if task:
            next_task(model)
        fit(LLAMA, model.train(), steps=2)
    return model.eval()


def adapters(model: nn.Module) -> dict[str, SdLora]:
    return {n: layer.lowrank_adapters["default"] for n, layer in layers(model).items()}


def test_golden() -> None:
    """Three tasks on one layer, by the paper and by the code; with the paper's norm for the current direction too."""
    x, found = det((2, 7), 0.2, 0.9, 0.4), {}
    for norm in ("paper", "code"):
        config = SdLoraConfig(r=2, norm=norm, normalise_current=norm == "paper", target_modules=["0"])
        model = get_peft_model(nn.Sequential(nn.Linear(7, 5)), config).double()  # pyright: ignore[reportArgumentType]
        (layer,), (adapter,) = layers(model).values(), adapters(model).values()
        for t in range(3):
            if t:
                next_task(model)
            adapter.down.data.copy_(det((2, 7), 0.3 + t, 0.4, 0.8))
            adapter.up.data.copy_(det((5, 2), 0.9 + t, 0.7, 0.5))
        adapter.shared.alpha.data.copy_(torch.tensor([1.5, 0.75, 1.25]))
        found[norm] = (layer(x) - layer.base_layer(x)).sum().item()
    assert found == pytest.approx({"paper": 6.1886462805, "code": 19.6347396944}, abs=1e-9)


# One task after another ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "first"), [("paper", 1.0), ("code", 0.8)])
def test_tasks_in_a_row(norm: str, first: float) -> None:
    """A new task starts at Σ α₀·D_k; training it moves every α and no bit of what was frozen."""
    model = after_tasks(2, norm=norm)
    trained = {n: (a.down.detach().clone(), a.up.detach().clone()) for n, a in adapters(model).items()}
    next_task(model)
    alpha = adapters(model)["model.layers.0.self_attn.q_proj"].shared.alpha
    assert alpha.tolist() == pytest.approx([first] * 3)
    for name, a in adapters(model).items():
        assert not a.blocks()[-1].delta().any()
        assert a.past_task.tolist() == [0, 0, 0, 1, 1, 1]
        down, up = trained[name]
        assert torch.equal(a.past_down[3:], down)
        assert torch.equal(a.past_up[:, 3:], up)
        for k in (0, 1):
            part = a.past_task == k
            direction = (a.past_up[:, part] @ a.past_down[part]) / a.past_norm[part][0]
            assert direction.norm() <= 1 + 1e-6
            if norm == "paper":
                assert direction.norm().item() == pytest.approx(1.0, abs=1e-5)
    frozen, before = {n: b.clone() for n, b in adapter_buffers(model).items()}, alpha.detach().clone()
    base = {n: layer.get_base_weight().clone() for n, layer in layers(model).items()}
    fit(LLAMA, model.train(), steps=2)
    assert_same(adapter_buffers(model), frozen)
    assert_same({n: layer.get_base_weight() for n, layer in layers(model).items()}, base)
    assert (alpha != before).all()
    assert len([p for p in model.parameters() if p.requires_grad]) == 1 + 2 * len(layers(model))


def test_one_vector_of_magnitudes_for_the_network() -> None:
    """Its gradient is the sum over layers, and the scale of a frozen or current factor cancels where it is normalised."""
    model = after_tasks(2, normalise_current=True)
    one = next(iter(adapters(model).values())).shared
    assert all(a.shared is one for a in adapters(model).values())
    (total,) = torch.autograd.grad(LLAMA.loss(model), one.alpha)
    for a in adapters(model).values():  # a vector of its own for every layer
        a._shared = (copy.deepcopy(one),)
    apart = torch.autograd.grad(LLAMA.loss(model), [a.shared.alpha for a in adapters(model).values()])
    torch.testing.assert_close(total, sum(apart), rtol=1e-4, atol=1e-6)
    wanted = LLAMA.out(model)
    for a in adapters(model).values():
        a.down.data *= 3.0
        a.up.data *= 0.25
    torch.testing.assert_close(LLAMA.out(model), wanted, rtol=1e-4, atol=1e-5)


def test_everything_survives_several_tasks(tmp_path: Path) -> None:
    """Files, copies, casts, merging, folding, a second adapter: as after the first task, which the table tests."""
    model = after_tasks(3, rank_schedule={1: 2})
    wanted, state = LLAMA.out(model), get_peft_model_state_dict(model)
    model.save_pretrained(tmp_path)
    for options in ({}, {"is_trainable": True}, {"low_cpu_mem_usage": True}):
        again = PeftModel.from_pretrained(LLAMA.build(), tmp_path, **options)
        assert_same(get_peft_model_state_dict(again), state)
        torch.testing.assert_close(LLAMA.out(again), wanted, rtol=1e-5, atol=1e-6)
    config = again.peft_config["default"]
    assert (config.task, config.rank_schedule) == (2, {1: 2})
    assert LLAMA.out(copy.deepcopy(model)).equal(wanted)

    model.merge_adapter()
    torch.testing.assert_close(LLAMA.out(model), wanted, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(LLAMA.out(stock_lora(model, LLAMA)), wanted, rtol=1e-4, atol=1e-5)
    assert {a.factors().rank for a in adapters(model).values()} == {3 + 2 + 2}

    second(model, LLAMA, row())
    next_task(model)
    assert model.peft_config["other"].task == 0
    model.set_adapter("other")
    assert torch.isfinite(LLAMA.out(model)).all()
    model.set_adapter("default")
    frozen = {n: b.clone() for n, b in adapter_buffers(model).items()}
    model.half()
    assert_same(adapter_buffers(model), frozen)  # frozen to the bit, in float32 whatever the model's dtype
    assert torch.isfinite(LLAMA.out(model).float()).all()


def test_the_next_task_of_a_saved_adapter_is_that_of_the_live_one(tmp_path: Path) -> None:
    live = after_tasks(2)
    live.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.build(), tmp_path, is_trainable=True)
    for model in (live, loaded):
        torch.manual_seed(3)
        registry.get("sd_lora").next_task(model, "default")  # as a caller does that knows no method by name
        fit(LLAMA, model.train(), steps=2)
    assert_same(get_peft_model_state_dict(loaded), get_peft_model_state_dict(live))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {n for n, _ in adapter_parameters(loaded)}


def test_folded_after_several_tasks(tmp_path: Path) -> None:
    base = LLAMA.build()
    base.save_pretrained(tmp_path / "base")
    model = after_tasks(3)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    report = fold_model(model, tmp_path / "folded", pad="none")
    assert report.needed_rank == 9
    assert report.worst.frobenius < 1e-6
    folded = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "folded")
    torch.testing.assert_close(LLAMA.out(folded), LLAMA.out(model), rtol=1e-4, atol=1e-5)


def test_experts_go_from_task_to_task_too(tmp_path: Path) -> None:
    both = ["experts.gate_up_proj", "experts.down_proj"]
    config = SdLoraConfig(r=2, target_modules=["o_proj"], target_parameters=both)
    model = get_peft_model(moe_models.build("qwen3_moe"), config)  # pyright: ignore[reportArgumentType]
    stir(model)
    next_task(model)
    stir(model)
    wanted = moe_models.out(model.eval())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(moe_models.build("qwen3_moe"), tmp_path)
    assert any("experts" in k and k.endswith("past_up") for k in get_peft_model_state_dict(again))
    assert torch.equal(moe_models.out(again.eval()), wanted)


def test_carry_alpha() -> None:
    model = after_tasks(2, carry_alpha=True)
    before = next(iter(adapters(model).values())).shared.alpha.tolist()
    next_task(model)
    assert next(iter(adapters(model).values())).shared.alpha.tolist() == pytest.approx([*before, 1.0])


# RR -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [({4: 8, 8: 6}, [10] * 4 + [8] * 4 + [6] * 3), ({3: 8, 7: 6}, [10] * 3 + [8] * 4 + [6] * 4)],
    ids=["code", "paper"],
)
def test_rank_schedule(schedule: dict[int, int], wanted: list[int]) -> None:
    config = SdLoraConfig(r=10, rank_schedule=schedule, rank_pattern={"v_proj": 7})
    assert [config.rank_in(t, "q_proj") for t in range(11)] == wanted
    assert [config.rank_in(t, "v_proj") for t in range(11)] == [min(r, 7) for r in wanted]
    # ViT-B, q and v
    assert [12 * 2 * r * (768 + 768) for r in (10, 8, 6)] == [368_640, 294_912, 221_184]


# KD -------------------------------------------------------------------------------------------------------------------


def unit(t: int) -> Factors:
    f = Factors(det((2, 7), 0.3 + t, 0.4, 0.8), det((5, 2), 0.9 + t, 0.7, 0.5))
    return f.scaled(1 / f.norm().item())


def test_golden_fit() -> None:
    coefficients, residual = fit_by_past(unit(2), [unit(0), unit(1)])
    assert coefficients == pytest.approx([0.1918488847, 0.3348943854], abs=1e-9)
    assert residual == pytest.approx(0.8844156788, abs=1e-9)
    assert residual**2 == pytest.approx(0.7821910930, abs=1e-9)


def test_a_mix_of_earlier_directions_is_found() -> None:
    mix = unit(0).scaled(0.3).concat(unit(1).scaled(-0.2))
    size = mix.norm().item()
    coefficients, residual = fit_by_past(mix.scaled(1 / size), [unit(0), unit(1)])
    assert residual < 1e-12
    assert coefficients == pytest.approx([0.3 / size, -0.2 / size], abs=1e-12)


@pytest.mark.parametrize("update", ["literal", "preserving"])
@pytest.mark.parametrize("normalise", [True, False])
def test_absorbing(update: str, normalise: bool, tmp_path: Path) -> None:
    """A direction in the span of the earlier ones is dropped, another kept; the file knows which, and the next task goes on."""
    model = after_tasks(2, kd=True, kd_update=update, normalise_current=normalise, kd_threshold=1e-4)
    next_task(model)
    name, *others = adapters(model)
    with torch.no_grad():
        for other in others:
            nn.init.normal_(adapters(model)[other].up)
        one = adapters(model)[name]
        part = one.past_task == 1
        one.down.copy_(one.past_down[part])
        one.up.copy_(1.7 * one.past_up[:, part])
        one.shared.alpha.copy_(torch.tensor([1.1, 0.9, 0.6]))
    wanted = LLAMA.out(model)
    gate = one.blocks()[-1].gate[0].item()
    found = absorb(model)
    assert found.keys() == set(adapters(model))
    assert found[name] < 1e-5
    assert min(found[other] for other in others) > 0.1
    assert not one.up.any()
    delta = one.past_delta[part][0].item()
    assert delta == pytest.approx(
        gate * 1.7 * one.past_norm[part][0].item() if update == "preserving" else 1.0, rel=1e-4
    )
    if update == "preserving":
        torch.testing.assert_close(LLAMA.out(model), wanted, rtol=1e-3, atol=1e-4)
    again = absorb(model)
    assert name not in again
    config = next_task(model)
    assert config.absorbed == {name: [2]}
    assert one.past_task.tolist() == [0] * 3 + [1] * 3
    assert adapters(model)[others[0]].past_task.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert one.past_delta[part][0].item() == pytest.approx(delta)  # it survives the new start of α
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    assert torch.equal(LLAMA.out(loaded), LLAMA.out(model))


def test_the_squared_residual_is_another_threshold() -> None:
    for residual, dropped in (("norm", False), ("sq", True)):
        model = after_tasks(1, kd=True, kd_residual=residual, kd_threshold=0.1)
        next_task(model)
        one = next(iter(adapters(model).values()))
        with torch.no_grad():
            one.down.copy_(one.past_down)
            one.up.copy_(one.past_up + 0.2 * one.past_up.roll(1, 0))
        (size,) = {v for n, v in absorb(model).items() if n == one.site.name}
        assert 0.1 < size < 0.1**0.5
        assert (not one.up.any()) is dropped


# Bad input ------------------------------------------------------------------------------------------------------------


def test_unknown_earlier_tasks(tmp_path: Path) -> None:
    model = adapt(LLAMA, row(task=2), live=False)
    for use in (lambda: LLAMA.out(model), lambda: model.merge_adapter(), lambda: next_task(model)):
        with pytest.raises(
            ValueError, match=r"SdLoraConfig: task=2, but the earlier directions at .* are not known; load"
        ):
            use()
    later = after_tasks(2)
    fresh = adapt(LLAMA, row(task=1), live=False)  # as a run does that starts from an adapter of its own task
    set_peft_model_state_dict(fresh, get_peft_model_state_dict(later))
    assert torch.equal(LLAMA.out(fresh), LLAMA.out(later))
    before = snapshot(later)
    with pytest.raises(ValueError, match="checkpoint of this sd_lora adapter"):
        set_peft_model_state_dict(later, get_peft_model_state_dict(adapt(LLAMA, row())))
    state = {k: v.clone() for k, v in get_peft_model_state_dict(later).items()}
    state[next(k for k in state if k.endswith("past_task"))] += 1
    with pytest.raises(ValueError, match=r"has the directions of tasks \[1\] at .*task=1"):
        set_peft_model_state_dict(later, state)
    assert_same(snapshot(later), before)


def test_tasks_that_cannot_end() -> None:
    model = after_tasks(1)
    with pytest.raises(ValueError, match="adapter_name='gone' must be an SD-LoRA of the model, which has default"):
        next_task(model, "gone")
    with pytest.raises(ValueError, match="kd=False must be true"):
        absorb(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged; call unmerge_adapter"):
        next_task(model)
    model.unmerge_adapter()
    next(iter(adapters(model).values())).up.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="has NaN or infinity"):
        next_task(model)
    assert model.peft_config["default"].task == 0
