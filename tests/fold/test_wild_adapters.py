"""Adapters as people have them: other tools' keys, renamed models, no task, one LoRA for each expert, a base that is not here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from rankfold import RasaConfig
from rankfold.doctor import diagnose
from rankfold.errors import RankfoldError
from rankfold.fold import fold_adapter, read_source

TOKENS = torch.arange(5, 21)[None]
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64,
}  # fmt: skip


def llama(folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL, **options)).save_pretrained(folder)
    return folder


def lora(base: PreTrainedModel, folder: Path, **options: Any) -> PeftModel:
    defaults: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(**{**defaults, **options})).eval()
    model.save_pretrained(folder)
    return model


def rename(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({change(k): v for k, v in load_file(path).items()}, path)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda k: k.replace(".weight", ".default.weight"), ""),  # torchtune's siblings, older checkpoints
        (lambda k: k.replace("base_model.model.", "base_model.model._orig_mod."), "wrappers"),
        (lambda k: k.replace(".self_attn.", "._fsdp_wrapped_module.self_attn._checkpoint_wrapped_module."), "wrappers"),
        (lambda k: "base_model.model." + k, "wrappers"),
        (lambda k: k.removeprefix("base_model.model."), "lack the prefix base_model.model., such as model.layers"),
    ],
)
def test_keys_that_wrappers_left(change: Callable[[str], str], note: str, tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    trained = logits(lora(AutoModelForCausalLM.from_pretrained(base), tmp_path / "a", task_type="CAUSAL_LM"))
    rename(tmp_path / "a", change)
    report = fold_adapter(tmp_path / "a", tmp_path / "out", dtype="float32")
    found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    torch.testing.assert_close(logits(found), trained, rtol=1e-5, atol=1e-5)
    assert bool(note) == any(note in n for n in report.notes if note)
    assert report.probe["max_logit_error"] < 1e-5  # type: ignore[operator]
    assert "does not explain" not in report.summary()
    report.probe["max_logit_error"] = report.probe["max_logit"]  # as where PEFT applies nothing of one side
    assert "the error on disk does not explain that difference" in report.summary()


def test_an_adapter_that_names_neither_task_nor_class(tmp_path: Path) -> None:
    """transformers' own add_adapter and torchtune save both as null."""
    base = llama(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "a")
    saved = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert saved["task_type"] is None
    assert saved["auto_mapping"] is None
    report = fold_adapter(tmp_path / "a", tmp_path / "out")
    assert report.probe["max_logit_error"] < 1e-4  # type: ignore[operator]
    assert fold_adapter(tmp_path / "a", tmp_path / "merged", profile="merged").worst.frobenius < 1e-5
    bare = LlamaModel.from_pretrained(base)
    bare.add_adapter(LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], init_lora_weights=False))
    bare.save_pretrained(tmp_path / "b")
    assert len(fold_adapter(tmp_path / "b", tmp_path / "bare", error=0.5).layers) == 2


def test_a_plain_lora_needs_no_base(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    options: dict[str, Any] = {"rank_pattern": {"1.self_attn.q_proj": 3}, "alpha_pattern": {"0.self_attn.q_proj": 5}}
    model = lora(AutoModelForCausalLM.from_pretrained(base), tmp_path / "a", use_rslora=True, **options)
    edit(tmp_path / "a", base_model_name_or_path="nowhere/gone")
    report = fold_adapter(tmp_path / "a", tmp_path / "out", dtype="float32")
    assert "the base was not looked at" in report.notes[0]
    found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]


@pytest.mark.parametrize(("options", "engines"), [
    ({"target_modules": ["q_proj", "v_proj"]}, {"vLLM", "SGLang", "TGI", "PEFT"}),
    ({"target_modules": ["q_proj"]}, {"vLLM", "TGI", "PEFT"}),
    ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0]}, {"vLLM", "SGLang", "PEFT"}),
])  # fmt: skip
def test_without_a_base_no_engine_is_named_that_wants_more(
    options: dict[str, Any], engines: set[str], tmp_path: Path
) -> None:
    """SGLang stops where q_proj has no v_proj beside it, and TGI drops what not every layer has; zeros need the base's shapes."""
    lora(AutoModelForCausalLM.from_pretrained(llama(tmp_path / "base")), tmp_path / "a", **options)
    assert {*fold_adapter(tmp_path / "a", tmp_path / "known").serve} == {"vLLM", "SGLang", "TGI", "PEFT"}
    edit(tmp_path / "a", base_model_name_or_path=None)
    assert {*fold_adapter(tmp_path / "a", tmp_path / "out").serve} == engines


def test_chosen_layers_without_a_base_are_named_in_full(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    lora(AutoModelForCausalLM.from_pretrained(base), tmp_path / "a", layers_to_transform=[0])
    edit(tmp_path / "a", base_model_name_or_path=None)
    fold_adapter(tmp_path / "a", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["0.self_attn.q_proj"]


def gemma3(folder: Path) -> Path:
    torch.manual_seed(0)
    text = {**SMALL, "head_dim": 8, "sliding_window": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 8, "patch_size": 4}, mm_tokens_per_image=4
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_old_names_of_a_multimodal_model(tmp_path: Path) -> None:
    """Gemma 3 once had language_model.model.layers; its files still have. PEFT converts and loads."""
    base = gemma3(tmp_path / "base")
    options: dict[str, Any] = {"target_modules": r".*language_model.*\.q_proj"}
    model = lora(Gemma3ForConditionalGeneration.from_pretrained(base), tmp_path / "a", **options)
    rename(tmp_path / "a", lambda k: k.replace("model.language_model.layers", "language_model.model.layers"))
    assert any("language_model.model.layers" in k for k in load_file(tmp_path / "a" / "adapter_model.safetensors"))
    report = fold_adapter(tmp_path / "a", tmp_path / "out", dtype="float32", probe=False)
    found = PeftModel.from_pretrained(Gemma3ForConditionalGeneration.from_pretrained(base), tmp_path / "out")
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-5)
    assert len(report.layers) == 2
    fold_adapter(tmp_path / "a", tmp_path / "merged", dtype="float32", profile="merged", probe=False)
    merged = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()


@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")  # PEFT's, about what it converts itself
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_one_lora_for_each_expert(family: str, tmp_path: Path) -> None:
    """As transformers 4 trained them; engines read these names, PEFT fuses them when it loads."""
    torch.manual_seed(0)
    if family == "mixtral":
        MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)).save_pretrained(
            tmp_path / "base"
        )
        experts, shapes = "block_sparse_moe.experts", {"w1": (48, 32), "w3": (48, 32), "w2": (32, 48)}
    else:
        config = Qwen3MoeConfig(**SMALL, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=8)
        Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")
        experts = "mlp.experts"
        shapes = {"gate_proj": (16, 32), "up_proj": (16, 32), "down_proj": (32, 16)}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora(base, tmp_path / "a", task_type="CAUSAL_LM")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    for layer in range(2):
        for expert in range(4):
            for name, (out, into) in shapes.items():
                key = f"base_model.model.model.layers.{layer}.{experts}.{expert}.{name}.lora_"
                tensors |= {f"{key}A.weight": torch.randn(4, into) / 8, f"{key}B.weight": torch.randn(out, 4) / 8}
    save_file(tensors, path)
    edit(tmp_path / "a", target_modules=["q_proj", *shapes])
    assert not diagnose(tmp_path / "a", base=tmp_path / "base").problems
    report = fold_adapter(tmp_path / "a", tmp_path / "out", dtype="float32", probe=False)
    assert len(report.layers) == 2 + 2 * 4 * 3
    outputs = [
        logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / name))
        for name in ("a", "out")
    ]
    assert not torch.allclose(outputs[0], logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), atol=1e-2)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(RankfoldError, match="one of several experts that this version of transformers fuses"):
        fold_adapter(tmp_path / "a", tmp_path / "merged", profile="merged", probe=False)


def test_modules_to_save_names_ends(tmp_path: Path) -> None:
    """PEFT matches the end of a name, so that "norm" keeps every layer's norms."""
    base = llama(tmp_path / "base")
    model = lora(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "a", task_type="CAUSAL_LM", modules_to_save=["norm"]
    )
    assert any("input_layernorm" in k for k in load_file(tmp_path / "a" / "adapter_model.safetensors"))
    fold_adapter(tmp_path / "a", tmp_path / "out", dtype="float32")
    found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word:UserWarning")
def test_tied_embeddings_that_peft_keeps_tied(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", tie_word_embeddings=True)
    model = lora(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "a", task_type="CAUSAL_LM",
        modules_to_save=["embed_tokens"], ensure_weight_tying=True,
    )  # fmt: skip
    fold_adapter(tmp_path / "a", tmp_path / "out", dtype="float32")
    found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning", "ignore:Model has `tie_word:UserWarning")
@pytest.mark.parametrize("kept", [None, ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("config", [LoraConfig, RasaConfig])
@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_is_merged(config: Any, kept: list[str] | None, tied: bool, tmp_path: Path) -> None:
    """PEFT saves the whole embeddings beside the adapter; an adapter's file for engines has no place for them."""
    base = llama(tmp_path / "base", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(70)
    options: dict[str, Any] = {
        "r": 4,
        "target_modules": ["q_proj"],
        "init_lora_weights": False,
        "modules_to_save": kept,
    }
    trained = get_peft_model(model, config(task_type="CAUSAL_LM", **options)).eval()
    trained.save_pretrained(tmp_path / "a")
    report = fold_adapter(tmp_path / "a", tmp_path / "merged", profile="merged", dtype="float32")
    assert report.probe["max_logit_error"] < 1e-5, report.probe  # type: ignore[operator]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 70
    torch.testing.assert_close(logits(merged), logits(trained), rtol=1e-5, atol=1e-5)
    if kept is None:
        with pytest.raises(RankfoldError, match=r"with 70 rows, .* vocabulary was resized, .*--profile merged"):
            fold_adapter(tmp_path / "a", tmp_path / "out")


def test_weights_that_files_name_otherwise(tmp_path: Path) -> None:
    """Files of ViT have vit.encoder.layer…query, the model of transformers 5 other names."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "base")
    target = next(n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)).rpartition(".")[2]
    lora(
        ViTForImageClassification.from_pretrained(tmp_path / "base"),
        tmp_path / "a",
        target_modules=[target],
        use_dora=True,
    )
    assert fold_adapter(tmp_path / "a", tmp_path / "out", rank=16, probe=False).worst.frobenius < 1e-5
    report = fold_adapter(tmp_path / "a", tmp_path / "merged", rank=16, probe=False, profile="merged", dtype="float32")
    assert report.worst.frobenius < 1e-4


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_scales_of_modules_that_had_other_names(rslora: bool, tmp_path: Path) -> None:
    """What transformers 4 called vit.encoder.layer.N.attention.attention.query is q_proj in transformers 5: patterns name it as it was."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(**small, image_size=8, patch_size=4))
    model.save_pretrained(tmp_path / "base")
    LoraConfig(
        r=4, lora_alpha=6, target_modules=["query", "value"], rank_pattern={"query": 2}, alpha_pattern={r"layer\.1\..*query": 32},
        use_rslora=rslora, base_model_name_or_path=str(tmp_path / "base"),
    ).save_pretrained(tmp_path / "a")  # fmt: skip
    tensors, expected = {}, {}
    for layer in range(2):
        for old, new, rank in (("query", "q_proj", 2), ("value", "v_proj", 4)):
            down, up = torch.randn(rank, 16), torch.randn(16, rank)
            at = f"base_model.model.vit.encoder.layer.{layer}.attention.attention.{old}"
            tensors |= {f"{at}.lora_A.weight": down, f"{at}.lora_B.weight": up}
            alpha = 32 if layer and old == "query" else 6
            expected[f"vit.layers.{layer}.attention.{new}"] = alpha / (rank**0.5 if rslora else rank) * up.double() @ down.double()  # fmt: skip
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    source = read_source(tmp_path / "a")
    assert source.adapted == list(expected)
    for name, update in expected.items():
        torch.testing.assert_close(source.update(name).delta(), update)
