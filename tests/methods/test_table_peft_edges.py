"""What PEFT ties to its own LoRA, on our adapters: taken over, or refused in one sentence before anything moves."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from models import BERT, LLAMA, TIED
from peft import (
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_base_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from peft.utils import hotswap
from table import FIRST, Row, adapt, adapter_parameters, first_rows, layers, second, snapshot, weights

from rankfold import PlainLoraConfig, RasaConfig
from rankfold.errors import RankfoldError
from rankfold.kernel.linears import separate_order

LORA_ROW, RASA_ROW = FIRST[:2]

# Optimisers -------------------------------------------------------------------------------------------------------------


def loraplus(model: PeftModel) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)


def warming_up(model: PeftModel) -> torch.optim.Optimizer:
    optimizer = loraplus(model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    return optimizer


def lorafa(model: PeftModel) -> torch.optim.Optimizer:
    return create_lorafa_optimizer(model, r=8, lora_alpha=8, lr=1e-3)


@first_rows
@pytest.mark.parametrize(("make", "instead"), [(loraplus, "LoraPlus"), (warming_up, "LoraPlus"), (lorafa, "LoraFa")])
def test_optimisers_of_peft_that_go_by_names_are_refused(row: Row, make: Callable, instead: str) -> None:
    """peft#1504: the gates got 16 times the rate, and B did not."""
    model = adapt(LLAMA, row, live=False).train()
    optimizer = make(model)
    before = snapshot(model)
    LLAMA.loss(model).backward()
    with pytest.raises(RankfoldError, match=rf"rankfold\.optim\.{instead}\("):
        optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in snapshot(model).items())


def test_a_head_does_not_hide_them() -> None:
    model = get_peft_model(BERT.build(), RasaConfig(target_modules=["query"], task_type="SEQ_CLS"))
    optimizer = loraplus(model)
    BERT.loss(model).backward()
    with pytest.raises(RankfoldError, match="create_loraplus_optimizer"):
        optimizer.step()


def test_other_optimisers_are_not_refused() -> None:
    model = adapt(LLAMA, RASA_ROW, live=False)
    matrices = [p for _, p in adapter_parameters(model) if p.ndim > 1]
    gates = [p for _, p in adapter_parameters(model) if p.ndim == 1]
    groups = [{"params": matrices}, {"params": gates, "lr": 1e-2}]
    for optimizer in (
        torch.optim.AdamW(groups, lr=1e-3),
        create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=1),
    ):
        LLAMA.loss(model).backward()
        optimizer.step()


def test_riemannian_is_refused_by_peft() -> None:
    with pytest.raises(ValueError, match="did not find any trainable lora_A/lora_B"):
        create_riemannian_optimizer(adapt(LLAMA, LORA_ROW), torch.optim.AdamW, lr=1e-3)


# Scales -----------------------------------------------------------------------------------------------------------------


@first_rows
def test_scale(row: Row) -> None:
    """scale_layer multiplies, set_scale replaces, unscale_layer takes back; unmerged, merged and as a delta."""
    model = adapt(LLAMA, row)
    second(model, LLAMA, row)
    whole = {name: layer.get_delta_weight("default") for name, layer in layers(model).items()}
    before, base = LLAMA.out(model), weights(model)
    for layer in layers(model).values():
        layer.scale_layer(0.5)
        layer.scale_layer(0.5)
        layer.set_scale("absent", 7.0)
    for name, layer in layers(model).items():
        torch.testing.assert_close(layer.get_delta_weight("default"), 0.25 * whole[name])
    quiet = LLAMA.out(model)
    assert not torch.allclose(quiet, before, atol=1e-3)
    model.merge_adapter()
    torch.testing.assert_close(LLAMA.out(model), quiet, rtol=1e-4, atol=1e-5)
    for name, layer in layers(model).items():
        torch.testing.assert_close(layer.get_base_weight(), base[name] + 0.25 * whole[name])
        with pytest.raises(RankfoldError, match="merged"):
            layer.scale_layer(2.0)
    model.unmerge_adapter()
    for layer in layers(model).values():
        layer.unscale_layer(0.5)
        layer.scale_layer(1)
        assert layer.lowrank_adapters["default"].multiplier == 0.5
        assert layer.lowrank_adapters["other"].multiplier == 1.0
        layer.set_scale("default", 3.0)
        layer.unscale_layer()
    assert torch.equal(LLAMA.out(model), before)


def test_rescaling_is_refused_by_peft() -> None:
    model = adapt(LLAMA, RASA_ROW)
    with (
        pytest.raises(ValueError, match="only supported for models with `LoraLayer`s"),
        rescale_adapter_scale(model, 0.5),
    ):
        pass


def test_input_casting_may_be_disabled() -> None:
    """There is none: x is never cast."""
    model = adapt(LLAMA, RASA_ROW)
    before = LLAMA.out(model)
    with disable_input_dtype_casting(model):
        assert torch.equal(LLAMA.out(model), before)
    assert all(layer.cast_input_dtype_enabled for layer in layers(model).values())


def test_half_precision_has_the_gradients_of_peft_in_separate_order() -> None:
    """bf16 base, float32 adapter, no autocast: PEFT casts x to float32, rankfold the factors to bf16."""
    g = torch.Generator().manual_seed(0)
    up, down, x, dy = (torch.randn(s, generator=g) for s in ((20, 4), (4, 12), (9, 12), (9, 20)))
    x, dy = x.bfloat16(), dy.bfloat16()
    exact = (dy.double() @ up.double()).T @ x.double(), dy.double().T @ (x.double() @ down.double().T)

    def gradients(config: peft.PeftConfig, *names: str) -> list[torch.Tensor]:
        model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(12, 20)).bfloat16(), config)
        found = [next(p for n, p in model.named_parameters() if name in n) for name in names]
        with torch.no_grad():
            found[0].copy_(down), found[1].copy_(up)
        model(x).backward(dy)
        return [p.grad for p in found]  # pyright: ignore[reportReturnType]

    fields = {"r": 4, "lora_alpha": 4, "target_modules": ["0"]}
    theirs = gradients(peft.LoraConfig(**fields), "lora_A", "lora_B")
    with separate_order():
        ours = gradients(PlainLoraConfig(**fields), ".down", ".up")
    fused = gradients(PlainLoraConfig(**fields), ".down", ".up")
    for a, b, c, true in zip(theirs, ours, fused, exact, strict=True):
        assert torch.equal(a, b)
        assert (b - true).norm() < 1e-6 * true.norm()
        assert 1e-4 * true.norm() < (c - true).norm() < 1e-2 * true.norm()


# Hot-swapping ------------------------------------------------------------------------------------------------------------


@first_rows
def test_hotswapping_is_refused(row: Row, tmp_path: Path) -> None:
    model = adapt(LLAMA, row)
    model.save_pretrained(tmp_path)
    before = LLAMA.out(model)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA"):
        hotswap.hotswap_adapter(model, str(tmp_path), "default")
    with pytest.raises(ValueError, match="No adapter layers found"):
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=16)
    plain = LLAMA.build()
    plain.load_adapter(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping is currently only supported for LoRA"):
        plain.load_adapter(tmp_path, adapter_name="default", hotswap=True)
    assert torch.equal(LLAMA.out(model), before)
    torch.testing.assert_close(LLAMA.out(plain), before, rtol=1e-5, atol=1e-6)


@first_rows
def test_what_else_knows_lora_by_type_is_refused(row: Row, tmp_path: Path) -> None:
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    model = adapt(LLAMA, row)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not using LoRA"):
        reduce_intruder_dimension(model)
    with pytest.raises(ValueError, match="can only be used with `init_lora_weights='eva'`"):
        peft.initialize_lora_eva_weights(model, [])
    with pytest.raises(ValueError, match=r"path_initial_model_for_weight_conversion.*not supported"):
        model.save_pretrained(tmp_path / "x", path_initial_model_for_weight_conversion=str(tmp_path))
    with pytest.raises(ValueError, match="not supported for mixed models"):
        peft.PeftMixedModel.from_pretrained(LLAMA.build(), tmp_path)


@first_rows
def test_a_field_of_lora_that_is_assigned_is_refused(row: Row) -> None:
    config = row.config(LLAMA)
    config.use_dora = False  # pyright: ignore
    get_peft_model(LLAMA.build(), config)
    config.use_dora = True  # pyright: ignore
    with pytest.raises(RankfoldError, match="use_dora=True is not supported"):
        get_peft_model(LLAMA.build(), config)


# States and names --------------------------------------------------------------------------------------------------------


@first_rows
def test_the_state_of_the_base_is_that_of_the_base(row: Row) -> None:
    for arch in (LLAMA, TIED):
        model, plain = adapt(arch, row), arch.build()
        second(model, arch, row)
        state = {k: v.clone() for k, v in get_base_model_state_dict(model).items()}
        assert state.keys() == plain.state_dict().keys()
        assert all(torch.equal(v, state[k]) for k, v in plain.state_dict().items())
        plain.load_state_dict(state)
        adapted = arch.out(model)
        set_base_model_state_dict(model, {k: 2 * v for k, v in state.items()}, strict=True)
        assert not torch.equal(arch.out(model), adapted)
        set_base_model_state_dict(model, state, strict=True)
        assert torch.equal(arch.out(model), adapted)


@pytest.mark.parametrize("row", FIRST[:5], ids=str)  # CoRA's module has one tensor; without it PEFT warns of the module
@pytest.mark.parametrize("which", [0, -1])
def test_a_state_that_names_the_sites_must_be_whole(row: Row, which: int) -> None:
    model = inject_adapter_in_model(row.config(LLAMA), LLAMA.build())
    state = get_peft_model_state_dict(model)
    fresh = LLAMA.build()
    inject_adapter_in_model(row.config(LLAMA), fresh, state_dict=state)
    assert fresh.state_dict().keys() == model.state_dict().keys()
    state.pop(sorted(state)[which])
    plain = LLAMA.build()
    with pytest.raises(RankfoldError, match="lacks 1 of"):
        inject_adapter_in_model(row.config(LLAMA), plain, state_dict=state)
    assert plain.state_dict().keys() == LLAMA.build().state_dict().keys()


def test_a_state_names_the_sites_of_a_compiled_model() -> None:
    row = RASA_ROW
    state = get_peft_model_state_dict(inject_adapter_in_model(row.config(LLAMA), LLAMA.build()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled = torch.compile(LLAMA.build(), backend="eager")
    model = inject_adapter_in_model(row.config(LLAMA), compiled, state_dict=state)
    assert {
        k.replace("_orig_mod.", "").replace(".default.", ".") for k in model.state_dict() if "lowrank" in k
    } == state.keys()


@pytest.mark.parametrize("name", ["half", "keys", "pop", "forward", "a.b", "", "_orig_mod"])
def test_names_that_torch_keeps_for_itself(name: str) -> None:
    row = RASA_ROW
    plain = LLAMA.build()
    before = plain.state_dict().keys()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT has a warning of its own for ""
        with pytest.raises(RankfoldError, match="adapter_name="):
            get_peft_model(plain, row.config(LLAMA), adapter_name=name)
        assert plain.state_dict().keys() == before
        model = adapt(LLAMA, row)
        before = snapshot(model)
        with pytest.raises(RankfoldError, match="adapter_name="):
            model.add_adapter(name, row.config(LLAMA))
    assert list(model.peft_config) == ["default"]
    assert snapshot(model).keys() == before.keys()


def test_tied_embeddings_that_are_trained_part_at_a_merge() -> None:
    """As with PEFT's LoRA without ensure_weight_tying: PEFT warns twice, and the merged model computes the same."""
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        model = get_peft_model(TIED.build(), RASA_ROW.config(TIED, modules_to_save=["embed_tokens"]))
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.modules_to_save["default"].weight.add_(1.0)
    before = TIED.out(model)
    with pytest.warns(UserWarning, match="no longer tied"):
        merged = model.merge_and_unload()
    assert not merged.config.tie_word_embeddings
    torch.testing.assert_close(TIED.out(merged), before, rtol=1e-4, atol=1e-5)


# Mixed batches and cards --------------------------------------------------------------------------------------------------


def test_a_mixed_batch_of_disabled_adapters_is_the_base() -> None:
    model = adapt(LLAMA, RASA_ROW)
    with model.disable_adapter():
        base = LLAMA.out(model)
        assert torch.equal(LLAMA.out(model, adapter_names=["default"] * 3), base)


@first_rows
def test_the_card_says_what_loads_the_adapter(row: Row, tmp_path: Path) -> None:
    """Without rankfold, PEFT ends with KeyError: 'RANKFOLD_...'."""
    model = adapt(LLAMA, row)
    second(model, LLAMA, row)
    for _ in range(2):  # PEFT updates the card that it finds
        model.save_pretrained(tmp_path / "a")
    for card in (tmp_path / "a/README.md", tmp_path / "a/other/README.md"):
        text = card.read_text()
        assert text.startswith("---\n")
        assert "library_name: peft" in text
        assert text.count("import rankfold") == 1
        assert text.count(f"`{row.facts.method}` adapter") == 1
        assert "rankfold fold" in text
    plain = LLAMA.build()
    plain.add_adapter(row.config(LLAMA))
    plain.save_pretrained(tmp_path / "b")
    assert "import rankfold" in (tmp_path / "b/README.md").read_text()


def test_a_readme_of_another_kind_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# My project\n")
    PlainLoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My project\n"
