"""What a merged model carries beside its weights: engines read its config by older keys, and its own tokenizer and labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
)

from rankfold.fold import fold_adapter, fold_model
from rankfold.io.old_keys import with_old_keys

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def base_and_adapter(model: Any, folder: Path, targets: str = "q_proj", **options: Any) -> tuple[Path, Path]:
    model.save_pretrained(folder / "base")
    config = LoraConfig(r=2, target_modules=[targets], init_lora_weights=False, **{"task_type": "CAUSAL_LM", **options})
    maker = AutoModelForSequenceClassification if config.task_type == "SEQ_CLS" else AutoModelForCausalLM
    adapted = get_peft_model(maker.from_pretrained(folder / "base"), config)  # type: ignore[arg-type]
    adapted.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def test_an_older_config_is_kept_as_it_is(tmp_path: Path) -> None:
    """mlx-lm, mistral.rs (missing field rope_theta), Ollama, TGI and LoRAX read rope_theta at the top level."""
    base, adapter = base_and_adapter(LlamaForCausalLM(LlamaConfig(**SMALL)), tmp_path)
    old = read(base / "config.json")
    del old["rope_parameters"], old["dtype"]
    old |= {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "torch_dtype": "float32", "of_its_own": [1]}
    (base / "config.json").write_text(json.dumps(old))
    report = fold_adapter(adapter, tmp_path / "out", profile="merged")
    found = read(tmp_path / "out" / "config.json")
    assert {key: found.get(key) for key in old if key != "transformers_version"} == {
        key: value for key, value in old.items() if key != "transformers_version"
    }
    assert report.probe["max_logit_error"] < 1e-4  # type: ignore[operator]
    fold_adapter(adapter, tmp_path / "half", profile="merged", dtype="bfloat16", probe=False)
    half = read(tmp_path / "half" / "config.json")
    assert half["torch_dtype"] == "bfloat16"
    assert half["rope_theta"] == 500000.0


@pytest.mark.parametrize(
    ("model", "targets", "wanted"),
    [
        (
            lambda: LlamaForCausalLM(
                LlamaConfig(**SMALL, rope_parameters={"rope_theta": 100000.0, "rope_type": "default"})
            ),
            "q_proj",
            {"rope_theta": 100000.0, "torch_dtype": "float32"},
        ),
        (
            lambda: LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters={"rope_theta": 5e5, **LLAMA3})),
            "q_proj",
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        ),
        (
            lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=8)),
            "q_proj",
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        ),
        (
            lambda: GPTNeoXForCausalLM(
                GPTNeoXConfig(
                    **{k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
                    rope_parameters={"rope_theta": 2e4, "rope_type": "default", "partial_rotary_factor": 0.5},
                )
            ),
            "query_key_value",
            {"rotary_emb_base": 2e4, "rotary_pct": 0.5},
        ),
    ],
    ids=["llama", "llama3", "gemma3", "gpt_neox"],
)
def test_a_new_config_gets_the_old_keys(model: Any, targets: str, wanted: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, adapter = base_and_adapter(model(), tmp_path, targets)
    report = fold_adapter(adapter, tmp_path / "out", profile="merged")
    found = read(tmp_path / "out" / "config.json")
    assert {key: found.get(key) for key in wanted} == wanted
    again, before = (AutoConfig.from_pretrained(folder).rope_parameters for folder in (tmp_path / "out", base))
    assert again == before
    assert report.probe["max_logit_error"] < 1e-4  # type: ignore[operator]


def test_every_how_many_layers_attention_is_full() -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    assert with_old_keys({"layer_types": kinds})["sliding_window_pattern"] == 3
    assert "sliding_window_pattern" not in with_old_keys({"layer_types": kinds[1:]})
    assert with_old_keys({"layer_types": kinds, "sliding_window_pattern": 7})["sliding_window_pattern"] == 7


def test_old_keys_of_modernbert() -> None:
    found = with_old_keys(json.loads(ModernBertConfig().to_json_string(use_diff=False)))
    assert (found["global_rope_theta"], found["local_rope_theta"]) == (160000.0, 10000.0)


def test_tensors_keep_the_names_of_the_base(tmp_path: Path) -> None:
    """The GPT-2 of the hub has its tensors without the prefix "transformer."."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32))
    base, adapter = base_and_adapter(model, tmp_path, "c_attn", fan_in_fan_out=True)
    path = base / "model.safetensors"
    save_file({k.removeprefix("transformer."): v for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    report = fold_adapter(adapter, tmp_path / "out", profile="merged")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(path).keys()
    assert report.probe["max_logit_error"] < 1e-4  # type: ignore[operator]


def test_the_adapters_own_tokenizer_wins_and_processors_travel(tmp_path: Path) -> None:
    base, adapter = base_and_adapter(LlamaForCausalLM(LlamaConfig(**SMALL)), tmp_path)
    for name in ("preprocessor_config.json", "processor_config.json", "tekken.json", "chat_template.jinja"):
        (base / name).write_text('{"of": "base"}')
    (base / "sentencepiece.bpe.model").write_text("base")
    fold_adapter(adapter, tmp_path / "plain", profile="merged", probe=False)
    assert (tmp_path / "plain" / "sentencepiece.bpe.model").read_text() == "base"
    (adapter / "tokenizer.json").write_text('{"of": "adapter"}')
    (adapter / "tokenizer_config.json").write_text('{"chat_template": "of the adapter"}')
    report = fold_adapter(adapter, tmp_path / "out", profile="merged", probe=False)
    out = tmp_path / "out"
    assert read(out / "tokenizer.json") == {"of": "adapter"}
    assert not (out / "tekken.json").exists()  # else the base's would be loaded
    assert not (out / "chat_template.jinja").exists()  # it would win over the adapter's
    assert (out / "preprocessor_config.json").exists()
    assert (out / "processor_config.json").exists()
    assert any("tokenizer.json" in note for note in report.notes)


def test_a_classifier_without_a_padding_token(tmp_path: Path) -> None:
    """transformers' classifiers on a decoder look for the last token before the padding, and take one row without."""
    _, adapter = base_and_adapter(LlamaForCausalLM(LlamaConfig(**SMALL)), tmp_path, task_type="SEQ_CLS")
    for profile in ("uniform", "merged"):
        report = fold_adapter(adapter, tmp_path / profile, profile=profile, dtype="float32")
        assert report.probe["max_logit_error"] < 1e-5, report.probe  # type: ignore[operator]
        assert any("no pad_token_id" in note for note in report.notes) == (profile == "merged")


def test_a_classifier_keeps_the_names_of_its_labels(tmp_path: Path) -> None:
    """Its pipeline answered LABEL_2."""
    _, adapter = base_and_adapter(LlamaForCausalLM(LlamaConfig(**SMALL, pad_token_id=0)), tmp_path, task_type="SEQ_CLS")
    (adapter / "README.md").write_text(
        "model = AutoModelForSequenceClassification.from_pretrained(base, id2label={0: 'no (not)', 1: 'yes'})\n"
    )
    base = read(tmp_path / "base" / "config.json")  # whose pipeline would answer with sigmoids, each label for itself
    (tmp_path / "base" / "config.json").write_text(json.dumps(base | {"problem_type": "multi_label_classification"}))
    fold_adapter(adapter, tmp_path / "out", profile="merged", probe=False)
    found = read(tmp_path / "out" / "config.json")
    assert found["problem_type"] == "single_label_classification"
    assert found["id2label"] == {"0": "no (not)", "1": "yes"}
    assert found["label2id"] == {"no (not)": 0, "yes": 1}
    assert found["architectures"] == ["LlamaForSequenceClassification"]
    for profile in ("uniform", "compact"):  # a fold is merged as the adapter itself
        fold_adapter(adapter, tmp_path / profile, profile=profile, probe=False)
        fold_adapter(tmp_path / profile, tmp_path / f"{profile} merged", profile="merged", probe=False)
        assert read(tmp_path / f"{profile} merged" / "config.json")["id2label"] == {"0": "no (not)", "1": "yes"}
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}, problem_type="regression"
    )
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="SEQ_CLS")
    fold_model(get_peft_model(model, config), tmp_path / "live", profile="merged")
    found = read(tmp_path / "live" / "config.json")
    assert (found["id2label"], found["problem_type"]) == ({"0": "a", "1": "b"}, "regression")
    model.config.save_pretrained(adapter)  # as people who train without us may
    fold_adapter(adapter, tmp_path / "beside", profile="merged", probe=False)
    found = read(tmp_path / "beside" / "config.json")
    assert (found["id2label"], found["problem_type"]) == ({"0": "a", "1": "b"}, "regression")
