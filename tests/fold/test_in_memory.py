"""fold_state_dict: the fold of a live model, in memory."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from rankfold import PlainLoraConfig, RasaConfig, SoraConfig
from rankfold.errors import RankfoldError
from rankfold.fold import fold_model, fold_state_dict
from rankfold.inspect import inspect_adapter

TINY = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=50,
)
TOKENS = torch.arange(12)[None]
RASA = RasaConfig(r=4, shared_rank=1, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
SORA = SoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, allow_unscheduled=True)


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return LlamaForCausalLM(TINY).eval()


def adapted(base: LlamaForCausalLM, config) -> PeftModel:
    return get_peft_model(deepcopy(base), deepcopy(config)).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def fold_modules(lora) -> list[str]:
    end = ".lora_A.weight"
    return [
        key.removeprefix("base_model.model.").removesuffix(end) for key in lora if key.endswith(end) and lora[key].any()
    ]


def stock(base: LlamaForCausalLM, lora) -> PeftModel:
    """Stock PEFT with these tensors in place of its own."""
    about = LoraConfig(**{k: v for k, v in lora.config.items() if k not in ("peft_type", "base_model_name_or_path")})
    model = get_peft_model(deepcopy(base), about)
    found = set_peft_model_state_dict(model, dict(lora))
    assert not found.unexpected_keys
    return model.eval()


@pytest.mark.parametrize(
    "config", [RASA, SORA, LoraConfig(r=3, use_rslora=True, init_lora_weights=False)], ids=["rasa", "sora", "peft"]
)
def test_stock_peft_with_it_answers_as_the_model(base, config):
    model = adapted(base, config)
    lora = fold_state_dict(model)
    assert lora.config["r"] == lora.config["lora_alpha"] == lora.rank == 8
    assert_close(logits(stock(base, lora)), logits(model), rtol=1e-4, atol=1e-5)
    assert (logits(base) - logits(model)).abs().max() > 0.01


def test_it_is_what_fold_model_writes(base, tmp_path):
    model = adapted(base, RASA)
    report = fold_model(model, tmp_path / "out")
    written, lora = load_file(tmp_path / "out" / "adapter_model.safetensors"), fold_state_dict(model)
    assert lora.keys() == written.keys()
    assert lora.rank == report.rank
    for key in (k for k in lora if "lora_A" in k):
        other = key.replace("lora_A", "lora_B")
        assert_close(lora[other] @ lora[key], written[other] @ written[key], rtol=1e-4, atol=1e-5)


def test_a_pruned_gate_leaves_no_component(base):
    model = adapted(base, SORA)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gate"):
                p[1:] = 0
    lora = fold_state_dict(model)
    assert_close(logits(stock(base, lora)), logits(model), rtol=1e-4, atol=1e-5)
    assert all(not t[1:].any() for key, t in lora.items() if "lora_A" in key)


def test_the_memory_of_an_earlier_call_is_used_again(base):
    model = adapted(base, RASA)
    lora = fold_state_dict(model)
    before = {key: t.data_ptr() for key, t in lora.items()}
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(0.5)
    again = fold_state_dict(model, out=lora)
    assert again is lora
    assert {key: t.data_ptr() for key, t in again.items()} == before
    assert_close(dict(again), dict(fold_state_dict(model)), rtol=0, atol=0)


def test_out_of_another_adapter_keeps_nothing_of_it(base):
    model, other = adapted(base, RASA), adapted(base, SORA)
    lora = fold_state_dict(other, out=fold_state_dict(model, dtype=torch.bfloat16))
    assert_close(dict(lora), dict(fold_state_dict(other)), rtol=0, atol=0)


def test_a_rank_that_is_too_high_is_compressed_as_well_as_it_can(base):
    model = adapted(base, RASA)
    lora = fold_state_dict(model, max_rank=2)
    assert lora.rank == 2
    assert len(lora.compressed) == 14
    full = fold_state_dict(model)
    key = "base_model.model.model.layers.0.mlp.up_proj"
    delta = full[f"{key}.lora_B.weight"].double() @ full[f"{key}.lora_A.weight"].double()
    cut = lora[f"{key}.lora_B.weight"].double() @ lora[f"{key}.lora_A.weight"].double()
    sigma = torch.linalg.svdvals(delta)
    best = float(sigma[2:].norm() / sigma.norm())
    assert float((delta - cut).norm() / delta.norm()) == pytest.approx(best, rel=1e-4)
    assert lora.compressed["model.layers.0.mlp.up_proj"] == pytest.approx(best, rel=1e-4)


def test_its_dtype_is_the_bases_or_as_asked(base):
    half = deepcopy(base).to(torch.bfloat16)
    model = get_peft_model(half, deepcopy(RASA))
    assert {t.dtype for t in fold_state_dict(model).values()} == {torch.bfloat16}
    assert {t.dtype for t in fold_state_dict(model, dtype=torch.float32).values()} == {torch.float32}


def test_an_embedding_and_the_output_head(base):
    model = adapted(base, PlainLoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], init_lora_weights=False))
    lora = fold_state_dict(model)
    assert "base_model.model.model.embed_tokens.lora_embedding_A" in lora
    assert_close(logits(stock(base, lora)), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [RASA, LoraConfig(r=4, init_lora_weights=False)], ids=["rasa", "peft"])
@pytest.mark.parametrize("wrapped", ["base", "model", "layers", "adapted layers"])
def test_names_of_wrappers_are_not_the_fold_s(base, config, wrapped, tmp_path):
    """torch.compile and activation checkpointing put theirs into the names of modules, where PEFT finds none of them."""
    config = deepcopy(config)
    config.modules_to_save = ["lm_head"]
    inner = deepcopy(base)
    model = get_peft_model(torch.compile(inner, backend="eager") if wrapped == "base" else inner, config).eval()  # type: ignore
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.normal_(std=0.1)
    before = logits(model)
    if wrapped == "model":
        model = torch.compile(model, backend="eager")
    elif wrapped != "base":
        kind = BaseTunerLayer if wrapped == "adapted layers" else LlamaDecoderLayer
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, kind))
    fold_model(model, tmp_path / "a")  # type: ignore[arg-type]
    lora = fold_state_dict(model)  # type: ignore[arg-type]
    lora.save(tmp_path / "b")
    for folder in ("a", "b"):
        found = PeftModel.from_pretrained(deepcopy(base), tmp_path / folder).eval()
        assert_close(logits(found), before, rtol=1e-4, atol=1e-5)
    assert [update.module for update in inspect_adapter(model).updates] == fold_modules(lora)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:Model has `tie_word:UserWarning", "ignore:.*Could not find a config:UserWarning")
@pytest.mark.parametrize("config", [RASA, LoraConfig(r=4, init_lora_weights=False)], ids=["rasa", "peft"])
@pytest.mark.parametrize("injected", [False, True])
def test_tied_heads_are_of_the_moment_and_saved_by_peft_s_names(config, injected, tmp_path):
    """Trained heads may lie in one memory, which safetensors refuses; an injected model's names lack PEFT's prefix."""
    base = LlamaForCausalLM(LlamaConfig(**{**TINY.to_dict(), "tie_word_embeddings": True}))
    config = deepcopy(config)
    config.modules_to_save, config.ensure_weight_tying = ["embed_tokens", "lm_head"], True
    copy = deepcopy(base)
    model = (inject_adapter_in_model(config, copy) if injected else get_peft_model(copy, config)).eval()
    head: torch.Tensor = model.get_input_embeddings().modules_to_save["default"].weight  # type: ignore
    with torch.no_grad():
        head.normal_()
    lora, before = fold_state_dict(model), logits(model)
    fold_model(model, tmp_path / "a")
    with torch.no_grad():
        head.zero_()
    lora.save(tmp_path / "b")
    for folder in ("a", "b"):
        assert_close(
            logits(PeftModel.from_pretrained(deepcopy(base), tmp_path / folder).eval()), before, rtol=1e-4, atol=1e-5
        )


def test_errors(base):
    model = adapted(base, RASA)
    with pytest.raises(RankfoldError, match="max_rank=0 must be"):
        fold_state_dict(model, max_rank=0)
    with pytest.raises(RankfoldError, match="adapter_name='other'"):
        fold_state_dict(model, adapter_name="other")
