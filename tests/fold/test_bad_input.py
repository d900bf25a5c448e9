"""What people give a fold: narrow types, values that overflow, shards, foreign code, paths with spaces."""

from __future__ import annotations

import json
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rankfold.fold import PROFILES, fold_adapter
from rankfold.host import peft_api
from rankfold.inspect import inspect_adapter

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def edit(adapter: Path, change) -> None:
    tensors = {name: change(name, tensor) for name, tensor in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, adapter / WEIGHTS)


def test_a_float8_adapter_folds_and_says_so(adapter: Path, tmp_path: Path) -> None:
    edit(adapter, lambda name, tensor: tensor.to(torch.float8_e4m3fn))
    report = fold_adapter(adapter, tmp_path / "out")
    assert report.worst.frobenius < 1e-6
    assert report.probe["max_logit_error"] < 1e-4  # pyright: ignore
    assert any("F8_E4M3" in note for note in report.notes)
    assert inspect_adapter(adapter).rank == 4


@pytest.mark.parametrize("profile", ["uniform", "compact", "mlx", "merged"])
def test_what_does_not_fit_the_type_is_not_written(profile: str, adapter: Path, tmp_path: Path) -> None:
    edit(adapter, lambda name, tensor: tensor * 1e5)
    with pytest.raises(ValueError, match=r"q_proj.*float16; give --dtype|not finite in torch.float16; give --dtype"):
        fold_adapter(adapter, tmp_path / "out", profile=profile, dtype="float16", probe=False)
    assert not (tmp_path / "out").exists()
    report = fold_adapter(adapter, tmp_path / "out", profile=profile, dtype="float32", probe=False)
    assert report.worst.frobenius < 1e-5


def test_a_base_that_does_not_fit_the_type_is_not_merged(base: Path, adapter: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    nn.init.constant_(model.model.norm.weight, 1e6)
    model.save_pretrained(base)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is not finite in torch\.float16"):
        fold_adapter(adapter, tmp_path / "out", profile="merged", dtype="float16", probe=False)


def test_a_probe_whose_logits_are_not_finite_is_skipped_and_the_report_is_json(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    nn.init.constant_(model.model.norm.weight, float("inf"))
    model.save_pretrained(base)
    report = fold_adapter(adapter, tmp_path / "out")
    assert report.probe == {"skipped": "the logits of the trained adapter are not finite"}
    text = (tmp_path / "out" / "fold_report.json").read_text()
    json.loads(text, parse_constant=pytest.fail)


def test_a_probe_that_fails_does_not_cost_the_fold(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ImportError("no package bitsandbytes\nsecond line")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", broken)
    report = fold_adapter(adapter, tmp_path / "out")
    assert str(report.probe["skipped"]).endswith("no package bitsandbytes")
    assert (tmp_path / "out" / WEIGHTS).is_file()


def test_shards_that_were_not_gathered(adapter: Path, tmp_path: Path) -> None:
    edit(adapter, lambda name, tensor: torch.empty(0))
    with pytest.raises(ValueError, match="ZeRO-3"):
        fold_adapter(adapter, tmp_path / "out")
    with pytest.raises(ValueError, match="ZeRO-3"):
        inspect_adapter(adapter)


def test_code_that_comes_with_a_base_is_never_run(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    ran = tmp_path / "ran"
    (base / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: pass\n")
    auto_map = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.C"}
    (base / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    with pytest.raises(ValueError, match="code of its own, which is never run here"):
        fold_adapter(adapter, tmp_path / "merged", profile="merged")
    report = fold_adapter(adapter, tmp_path / "out")  # a plain LoRA needs no class of its base
    assert "code of its own, which is never run here" in report.notes[0]
    assert not ran.exists()


def test_merged_needs_safetensors_and_says_so(base: Path, adapter: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has no model\.safetensors here.*save_pretrained"):
        fold_adapter(adapter, tmp_path / "out", profile="merged")


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_commands_are_quoted(profile: str, adapter: Path, tmp_path: Path) -> None:
    if profile == "gguf":
        pytest.importorskip("gguf")
    out = tmp_path / "my folds; rm -r x"
    report = fold_adapter(adapter, out, profile=profile, probe=False)
    commands = [c for c in report.serve.values() if "(" not in c]
    assert commands
    for command in commands:
        assert any(word.removeprefix("fold=").startswith(str(out)) for word in shlex.split(command)), command


@pytest.mark.parametrize(
    "member", ["BaseTunerLayer._get_available_adapters", "BaseTuner._remap_adapter_state_dict_for_load"]
)
def test_a_peft_without_a_member_that_folding_calls_is_named(member: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners import tuners_utils

    owner, name = member.split(".")
    monkeypatch.delattr(getattr(tuners_utils, owner), name)
    with pytest.raises(ImportError, match=rf"PEFT .* does not have .*{name}.*install peft>="):
        runpy.run_path(str(peft_api.__file__))
