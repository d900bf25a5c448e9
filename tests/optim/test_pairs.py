"""Which parameters are a pair, for rankfold's adapters and PEFT's, and what is said of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_llama import TARGETS, adapted, batch, llama
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from rankfold import (
    AdaSvdConfig,
    BlockLoraConfig,
    CoraConfig,
    DynamicDoraConfig,
    PlainLoraConfig,
    RacLoraConfig,
    RasaConfig,
    SboraConfig,
    SdLoraConfig,
    SoraConfig,
    attach,
)
from rankfold.errors import RankfoldError
from rankfold.host.layer import AdaptedLayer
from rankfold.kernel.factors import Factors
from rankfold.optim import LoraFa, LoraPlus, LoraRite, describe, pairs
from rankfold.optim.pairs import Pair, split


def check_identity(model: nn.Module) -> None:
    """g_A·Aᵀ = Bᵀ·g_B with each factor as the other sees it, and s·Bᵀ·G = g_A for one G: a wrong partner or scale shows."""
    found = pairs(model)
    with torch.no_grad():
        for p in found:
            p.up.normal_()
    ids = batch(0)
    model(input_ids=ids, labels=ids).loss.backward()
    for p in found:
        gate = torch.ones(p.rank) if p.gate is None else p.gate.values()
        a, b = gate[:, None] * p.down.detach(), p.up.detach() * gate
        assert p.down.grad is not None
        assert p.up.grad is not None
        scale = float((p.down.grad @ a.T).abs().max())
        assert scale > 0
        torch.testing.assert_close(
            p.down.grad @ a.T, b.T @ p.up.grad, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, p=p: f"{p.name} {m}"
        )


@pytest.mark.parametrize(
    ("config", "plain"),
    [
        (PlainLoraConfig(r=4, target_modules=TARGETS), set()),
        (SoraConfig(r=4, target_modules=TARGETS), {"gate"}),
        (RasaConfig(r=4, shared_rank=1, target_modules=TARGETS), {"gate", "pool"}),
    ],
    ids=["lora", "sora", "rasa"],
)
def test_our_adapters(config: Any, plain: set[str]) -> None:
    model = adapted(config)
    parts = split(model)
    rank = 3 if "pool" in plain else 4
    assert [p.name for p in parts.pairs] == [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]  # fmt: skip
    assert {p.rank for p in parts.pairs} == {rank}
    assert {p.why for p in parts.plain} == ({"gate of a pair"} if plain else set()) | ({"shared by several layers"} if "pool" in plain else set())  # fmt: skip
    assert all((p.gate is not None) == bool(plain) for p in parts.pairs)
    everything = {id(p) for p in model.parameters() if p.requires_grad}
    assert everything == {id(f) for p in parts.pairs for f in (p.down, p.up)} | {id(p.parameter) for p in parts.plain}
    check_identity(model)


def test_a_gate_is_read_where_it_lies() -> None:
    model = adapted(RasaConfig(r=4, shared_rank=1, target_modules=TARGETS))
    for p in pairs(model):
        assert p.gate is not None
        with torch.no_grad():
            p.gate.parameter.copy_(torch.arange(len(p.gate.parameter)))
        assert p.gate.values().tolist() == [0.0, 1.0, 2.0]


def test_peft_scales_and_ranks_are_the_layers() -> None:
    model = adapted(use_rslora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"down_proj": 6})
    found = {p.name: (p.rank, p.scale) for p in pairs(model)}
    assert found["model.layers.1.self_attn.q_proj"] == (4, 8 / 4**0.5)
    assert found["model.layers.1.self_attn.v_proj"] == (2, 8 / 2**0.5)
    assert found["model.layers.0.mlp.down_proj"] == (4, 6 / 4**0.5)
    check_identity(model)


def test_dora_bias_and_head_are_plain() -> None:
    model = adapted(use_dora=True, modules_to_save=["lm_head"])
    parts = split(model)
    assert len(parts.pairs) == 6
    assert sorted({p.name.split(".")[-2] if "magnitude" in p.name else "head" for p in parts.plain}) == [
        "default",
        "head",
    ]
    assert len(parts.plain) == 7
    text = describe(model)
    assert "6 pairs" in text
    assert "7 plain tensors (AdamW)" in text
    assert "lm_head" in text
    model = get_peft_model(GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)), LoraConfig(r=2, target_modules=["c_attn"], lora_bias=True, fan_in_fan_out=True))  # fmt: skip
    parts = split(model)
    assert [p.shape for p in parts.pairs] == [(48, 16, 2)]  # Conv1D
    assert [p.name.endswith("lora_B.default.bias") for p in parts.plain] == [True]
    check_identity(model)


@pytest.mark.parametrize("ours", [False, True])
def test_embeddings(ours: bool) -> None:
    targets = ["embed_tokens", "q_proj"]
    model = adapted(PlainLoraConfig(r=4, target_modules=targets)) if ours else adapted(target_modules=targets)
    found = pairs(model)
    assert [p.embedding for p in found] == [True, False, False]
    assert found[0].shape == (16, 32, 4)
    with torch.no_grad():
        found[0].down.normal_()
    check_identity(model)


def test_experts() -> None:
    """A pair of each expert, named by its index; those that no token goes to have no gradient and stay."""
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    torch.manual_seed(0)
    base = MixtralForCausalLM(MixtralConfig(vocab_size=32, num_local_experts=4, num_experts_per_tok=1, **sizes))
    model: Any = get_peft_model(base, PlainLoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"]))
    found = pairs(model)
    assert len({p.name for p in found}) == len(found) == 4
    assert found[3].name.endswith("experts.3.down_proj")
    assert {p.shape for p in found} == {(16, 24, 2)}
    optimizer = LoraRite(model, lr=0.01)
    ids = torch.zeros(1, 2, dtype=torch.long)  # one token twice, so that few experts are asked
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moved = [bool(p.up.any()) for p in found]
    assert any(moved)
    assert moved == [p.up.grad is not None and bool(p.up.grad.any()) for p in found]


def test_several_adapters() -> None:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"]))
    assert len(pairs(model)) == 6  # the second one is frozen
    model.set_adapter("second")
    assert [(p.name, p.rank, p.scale) for p in pairs(model)] == [
        (f"model.layers.{i}.self_attn.q_proj[second]", 2, 1.0) for i in (0, 1)
    ]
    check_identity(model)
    model.base_model.set_adapter(["default", "second"])
    both = pairs(model)
    assert len({p.name for p in both}) == len(both) == 8
    assert {p.rank for p in both if p.name.endswith("[second]")} == {2}


def test_names_without_wrappers() -> None:
    model = adapted()
    names = [p.name for p in pairs(model)]
    assert [p.name for p in pairs(torch.nn.ModuleDict({"module": model})["module"])] == names
    assert [p.name for p in pairs(torch.compile(model))] == names  # pyright: ignore[reportArgumentType]


# Errors ---------------------------------------------------------------------------------------------------------------


def test_no_pairs() -> None:
    with pytest.raises(RankfoldError, match=r"LlamaForCausalLM has no trainable pair.*get_peft_model"):
        pairs(llama())
    model = adapted()
    model.requires_grad_(False)
    with pytest.raises(RankfoldError, match="no trainable pair"):
        LoraRite(model)
    with pytest.raises(RankfoldError, match=r"no trainable pair.*shared by several layers"):
        pairs(adapted(RasaConfig(r=4, shared_rank=4, target_modules=TARGETS)))


@pytest.mark.parametrize("which", ["down", "up"])
def test_half_frozen(which: str) -> None:
    model = adapted(PlainLoraConfig(r=4, target_modules=TARGETS))
    getattr(pairs(model)[2], which).requires_grad_(False)
    with pytest.raises(RankfoldError, match=f"mlp.down_proj: {which} is frozen and the other factor is not"):
        LoraRite(model)
    if which == "down":
        assert len(LoraFa(model).pairs) == 6
    else:
        with pytest.raises(RankfoldError, match="up is frozen"):
            LoraFa(model)


@pytest.mark.parametrize(("side", "frozen"), [("right", "down"), ("left", "up")])
def test_a_drawn_factor(side: Any, frozen: str) -> None:
    model = adapted(RacLoraConfig(r=4, links=2, side=side, target_modules=TARGETS))
    for cls in (LoraRite, LoraFa):
        with pytest.raises(
            RankfoldError, match=f"q_proj: {frozen} is frozen .* in RAC-LoRA, .* to train; take torch.optim.AdamW"
        ):
            cls(model)


def test_a_frozen_basis(tmp_path: Path) -> None:
    from rankfold.methods.cora_subspace import build_subspace

    for seed in (0, 1, 2):
        torch.manual_seed(seed)
        model = llama()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        model.save_pretrained(tmp_path / str(seed))
    build_subspace([tmp_path / str(s) for s in (0, 1, 2)], tmp_path / "basis.safetensors", rank=4, targets=["q_proj"])
    basis = str(tmp_path / "basis.safetensors")
    with pytest.raises(RankfoldError, match=r"q_proj: up is frozen .* to train; take torch.optim.AdamW"):
        pairs(adapted(CoraConfig(r=4, basis=basis)))
    assert len(pairs(adapted(CoraConfig(r=4, basis=basis, approach=2)))) == 2


def test_tied() -> None:
    model = adapted()
    layers = model.base_model.model.model.layers
    layers[1].self_attn.q_proj.lora_A["default"].weight = layers[0].self_attn.q_proj.lora_A["default"].weight
    with pytest.raises(
        RankfoldError, match=r"layers.1.self_attn.q_proj: its factors are tied to those of model.layers.0"
    ):
        pairs(model)
    layers[1].self_attn.q_proj.lora_A["default"].weight = nn.Parameter(
        layers[0].self_attn.q_proj.lora_A["default"].weight
    )
    with pytest.raises(RankfoldError, match="tied"):  # two parameters, one storage, as PEFT ties embeddings
        pairs(model)


def test_flat_shards() -> None:
    model = adapted()
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
    weight.weight = nn.Parameter(weight.weight.detach().flatten()[:10].clone())
    with pytest.raises(RankfoldError, match="q_proj: its factors are sharded over processes"):
        pairs(model)


@pytest.mark.parametrize(
    ("config", "title"), [(AdaSvdConfig, "AdaLoRA"), (DynamicDoraConfig, "Dynamic DoRA")], ids=["adalora", "dora"]
)
def test_penalised_factors_are_refused(config: Any, title: str) -> None:
    model = adapted(config(r=4, target_r=2, target_modules=TARGETS))
    with pytest.raises(RankfoldError, match=f"q_proj: {title} adds a penalty on the factors"):
        LoraRite(model)
    assert LoraPlus(model).param_groups
    # pairs made by hand are only seen with their controller
    adapters = [a for m in model.modules() if isinstance(m, AdaptedLayer) for a in m.adapters(["default"])]
    optimizer = LoraRite([Pair(a.site.name, a.down, a.up, a.scaling) for a in adapters])  # pyright: ignore[reportArgumentType]
    optimizer.add_param_group({"params": [a.gate for a in adapters]})
    with pytest.raises(RankfoldError, match=rf"'default': {title} adds a penalty .* LoraRite would take"):
        attach(model, optimizer, total_steps=100)


def test_computed_factors_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    from rankfold.methods.lora import Lora

    model = adapted(PlainLoraConfig(r=4, target_modules=TARGETS))
    monkeypatch.setattr(Lora, "blocks", lambda self: (Factors(self.down * 2, self.up),))
    with pytest.raises(
        RankfoldError, match=r"no trainable pair of LoRA factors \(LoRA computes its factors from other parameters"
    ):
        pairs(model)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (BlockLoraConfig, r"no trainable pair of LoRA factors \(Block-LoRA computes its factors from other"),
        (SdLoraConfig, r"no trainable pair of LoRA factors \(SD-LoRA computes its factors from other"),
        (SboraConfig, "is frozen and the other factor is not in SBoRA, so"),
    ],
)
def test_methods_without_pairs(config: Any, says: str) -> None:
    with pytest.raises(RankfoldError, match=says):
        LoraRite(adapted(config(r=4, target_modules=TARGETS)))


@pytest.mark.parametrize("model", [[], None, [torch.zeros(2)], {"params": []}], ids=str)
def test_neither_model_nor_pairs(model: Any) -> None:
    for cls in (LoraRite, LoraPlus):
        with pytest.raises(RankfoldError, match=f"{cls.__name__}: model=.* is neither a model nor a list of its pairs"):
            cls(model)
