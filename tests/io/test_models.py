"""Models by name, without weights, and never with code of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf

from rankfold.io.models import ModelError, load_base, model_config, named_class, skeleton

CONFIG = hf.LlamaConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32, dtype="bfloat16"
)


def test_a_skeleton_has_the_shapes_and_types_and_no_memory() -> None:
    CONFIG.architectures = ["LlamaForCausalLM"]
    made = skeleton(CONFIG)
    assert type(made) is hf.LlamaForCausalLM
    assert {p.device.type for p in made.parameters()} == {"meta"}
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert next(skeleton(CONFIG, dtype=torch.float32).parameters()).dtype == torch.float32
    heads = (hf.AutoModelForImageClassification, hf.AutoModelForSequenceClassification)
    assert type(skeleton(CONFIG, heads)) is hf.LlamaForSequenceClassification
    with pytest.raises(ModelError, match="no AutoModelForImageClassification of a llama"):
        skeleton(CONFIG, heads[:1])


def test_the_class_of_an_adapter_s_base() -> None:
    assert named_class("AutoModelForCausalLM") is hf.AutoModelForCausalLM
    assert named_class("LlamaModel") is hf.LlamaModel
    for name in (None, "", "NoSuchModel", "pipeline"):
        assert named_class(name) is hf.AutoModel


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", r"it holds \[1, 2\] where an object is expected"),
        ("{", "not a valid JSON file"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "num_attention_heads=0 must be a positive number"),
        ('{"model_type": "llama", "hidden_size": "x"}', r"'hidden_size' expected int, got str \(value: 'x'\)"),
        ('{"model_type": "llama", "vocab_size": null}', "'vocab_size' expected int"),
        ('{"model_type": "llama", "architectures": [7]}', r"architectures=\[7\] must be a list of names"),
        ('{"hidden_size": 16}', "Should have a `model_type` key"),
        ('{"model_type": ["llama"]}', "unhashable"),
    ],
)
def test_a_damaged_config_is_one_sentence(content: str, message: str, tmp_path: Path) -> None:
    """For every command: all of them read configs here."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message) as found:
        model_config(tmp_path)
    assert "\n" not in str(found.value)


def test_code_of_a_model_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where transformers would ask on the terminal, nor where somebody answers yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    ran = tmp_path / "ran"
    (tmp_path / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: pass\n")
    auto_map = {"AutoConfig": "code.C", "AutoModel": "code.C", "AutoModelForCausalLM": "code.C"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    with pytest.raises(ModelError, match="code of its own, which is never run here"):
        model_config(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_base(hf.AutoModelForCausalLM, tmp_path, "auto")
    assert not ran.exists()
