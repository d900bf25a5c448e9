"""`model.add_weighted_adapter` on our models: the update in float64, saved, loaded, merged and folded; and every refusal."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rankfold import PlainLoraConfig, RasaConfig
from rankfold.errors import RankfoldError
from rankfold.fold import fold_adapter, fold_model
from rankfold.host.layer import AdaptedLayer

TOKENS = torch.arange(5, 21)[None]


def config(**fields: Any) -> PlainLoraConfig:
    return PlainLoraConfig(
        **{"task_type": "CAUSAL_LM", "init_lora_weights": False, "target_modules": ["q_proj", "up_proj"], **fields}
    )


ONE = config(r=4, lora_alpha=6, lora_dropout=0.1)
OTHER = config(
    r=3,
    use_rslora=True,
    target_modules=r".*(q|v)_proj",
    rank_pattern={"0.self_attn.q_proj": 7},
    alpha_pattern={"v_proj": 2},
)


def model_with(base: Path, *configs: PlainLoraConfig) -> Any:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), copy.deepcopy(configs[0]), adapter_name="a0")
    for i, one in enumerate(configs[1:], 1):
        model.add_adapter(f"a{i}", copy.deepcopy(one))
    return model.eval()


def updates(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {
        layer.lowrank_adapters[name].site.name: layer.lowrank_adapters[name].double().factors().delta().detach()  # pyright: ignore
        for layer in copy.deepcopy(model).modules()
        if isinstance(layer, AdaptedLayer) and name in layer.lowrank_adapters
    }


def assert_sum(model: nn.Module, name: str, terms: dict[str, float]) -> None:
    wanted: dict[str, Any] = {}
    for adapter, weight in terms.items():
        for module, delta in updates(model, adapter).items():
            wanted[module] = wanted.get(module, 0) + weight * delta
    found = updates(model, name)
    assert found.keys() == wanted.keys()
    for module, delta in wanted.items():
        assert (found[module] - delta).norm() < 2e-7 * delta.norm(), module


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def test_cat_is_the_sum_and_lives_on(bases: dict[str, Path], tmp_path: Path) -> None:
    model = model_with(bases["llama"], ONE, OTHER)
    before = logits(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    model.add_weighted_adapter(["a0", "a1"], [0.7, -1.3], "both")
    assert_sum(model, "both", {"a0": 0.7, "a1": -1.3})
    assert model.active_adapter == "a0"
    assert torch.equal(logits(model), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained

    model.set_adapter("both")
    wanted = logits(model)
    assert (wanted - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["llama"]), tmp_path / "both").eval()
    assert torch.equal(logits(again), wanted)
    report = fold_adapter(tmp_path / "both", tmp_path / "fold")
    assert report.worst.frobenius < 1e-6
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["llama"]), tmp_path / "fold").eval()
    torch.testing.assert_close(logits(stock), wanted, rtol=1e-4, atol=1e-5)
    assert fold_model(model, tmp_path / "live", adapter_name="both").worst.frobenius < 1e-6
    torch.testing.assert_close(logits(model.merge_and_unload()), wanted, rtol=1e-4, atol=1e-5)


def test_linear_keeps_the_rank_where_the_sum_has_it(bases: dict[str, Path]) -> None:
    model = model_with(bases["llama"], ONE, ONE)
    with pytest.raises(RankfoldError, match=r"'linear': at .* needs more rank .* choose 'cat'"):
        model.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], "both", combination_type="linear")
    assert "both" not in model.peft_config
    model.add_weighted_adapter(["a0"], [-0.5], "less", combination_type="linear")
    assert_sum(model, "less", {"a0": -0.5})
    for layer in model.modules():
        if isinstance(layer, AdaptedLayer):
            layer.lowrank_adapters["a1"].down.data.copy_(layer.lowrank_adapters["a0"].down)  # pyright: ignore
    model.add_weighted_adapter(["a0", "a1"], [2.0, 1.0], "both", combination_type="linear")
    assert_sum(model, "both", {"a0": 2.0, "a1": 1.0})
    assert model.peft_config["both"].r == 4


def test_a_module_whose_name_ends_another() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    tuned: Any = get_peft_model(model, PlainLoraConfig(r=2, target_modules="0", init_lora_weights=False))  # pyright: ignore
    tuned.add_weighted_adapter(["default"], [2.0], "twice")
    assert_sum(tuned, "twice", {"default": 2.0})


def test_a_compiled_model(bases: dict[str, Path]) -> None:
    """torch.compile puts a prefix before the names of all layers."""
    base: Any = torch.compile(AutoModelForCausalLM.from_pretrained(bases["llama"]), backend="eager")
    model: Any = get_peft_model(base, copy.deepcopy(ONE))
    model.add_weighted_adapter(["default"], [-2.0], "minus")
    assert not any("_orig_mod" in key for key in model.peft_config["minus"].target_modules)
    assert_sum(model, "minus", {"default": -2.0})


def test_refusals(bases: dict[str, Path]) -> None:
    model = model_with(bases["llama"], ONE, OTHER)
    add = model.add_weighted_adapter
    for arguments, message in {
        (("a0", "no"), (1.0, 1.0), "x"): r"adapters=\['a0', 'no'\]: the model has a0, a1",
        (("a0",), (1.0,), "a1"): "adapter_name='a1' exists",
        (("a0",), (1.0,), "half"): "adapter_name='half' cannot name an adapter",
        (("a0", "a1"), (1.0,), "x"): "must be 2 finite numbers",
        (("a0",), (float("inf"),), "x"): "must be 1 finite numbers",
        (("a0", "a1"), (1.0, 1.0), "x", "svd"): "combination_type='svd' is not exact.*rankfold combine",
        (("a0", "a1"), (1.0, 1.0), "x", "ties"): "combination_type='ties' is not exact.*rankfold combine",
    }.items():
        with pytest.raises(RankfoldError, match=message):
            add(*arguments)
    with pytest.raises(RankfoldError, match="density is of approximations"):
        add(["a0"], [1.0], "x", density=0.2)
    assert set(model.peft_config) == {"a0", "a1"}
    rasa: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(bases["llama"]),
        RasaConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    with pytest.raises(RankfoldError, match=r"a sum of rasa adapters is not a rasa adapter.*rankfold combine"):
        rasa.add_weighted_adapter(["default"], [1.0], "x")
    rows = model_with(bases["llama"], config(trainable_token_indices=[1, 2]))
    with pytest.raises(RankfoldError, match="trainable_token_indices: what it trains beside the factors"):
        rows.add_weighted_adapter(["a0"], [1.0], "copy")
    head = model_with(bases["llama"], config(modules_to_save=["lm_head"]))
    with pytest.raises(RankfoldError, match=r"'a0' has a trained head .*rankfold combine"):
        head.add_weighted_adapter(["a0"], [1.0], "x")
