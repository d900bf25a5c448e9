"""The update that an adapter really makes, and what it trains beside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rankfold.fold import fold_adapter
from rankfold.inspect import inspect_adapter

TINY = LlamaConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=32,
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(TINY).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_saved_at_its_start_moves_nothing(start: str, base: Path, tmp_path: Path) -> None:
    """s · BA is what the start took out of the base, not an update: its norm was shown as 7.36."""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "a")
    assert inspect_adapter(tmp_path / "a").norm < 1e-5
    assert inspect_adapter(model).norm < 1e-5


def test_what_is_left_out_is_named(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(
        r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path / "a")
    found = inspect_adapter(tmp_path / "a")
    assert [u.module for u in found.updates] == ["model.embed_tokens", "model.layers.0.self_attn.q_proj"]
    assert [sentence.partition(":")[0] for sentence in found.left_out] == ["modules_to_save"]
    assert any("modules_to_save: ['lm_head']" in sentence for sentence in inspect_adapter(model).left_out)
    assert "lm_head" in found.to_json()


def test_keys_that_peft_drops_are_named_or_refused(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "use_superlora": False, "_made_by": "x"}))
    report = fold_adapter(tmp_path / "a", tmp_path / "out")
    assert any("_made_by, use_superlora" in note for note in report.notes)
    path.write_text(json.dumps({**saved, "use_superlora": True}))
    for read in (lambda: fold_adapter(tmp_path / "a", tmp_path / "b"), lambda: inspect_adapter(tmp_path / "a")):
        with pytest.raises(ValueError, match="use_superlora=True is not a key of LoraConfig"):
            read()
