"""An adapter that pins a revision of its base: config, weights and tokenizer are all of that revision."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rankfold.algebra import diff
from rankfold.fold import fold_adapter

TOKENS = torch.arange(5, 21)[None]
HUB, TAG, COMMITS = "toy/base", "v1", {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Two revisions of one model in a hub cache: other weights, another width, and only v1 has a tokenizer."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--toy--base"
    (repo / "refs").mkdir(parents=True)
    for (tag, commit), inner in zip(COMMITS.items(), (40, 24), strict=True):
        torch.manual_seed(inner)
        config = LlamaConfig(
            hidden_size=16, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
        )
        LlamaForCausalLM(config).save_pretrained(repo / "snapshots" / commit)
        (repo / "refs" / tag).write_text(commit)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(repo / "snapshots" / COMMITS[TAG])
    return {tag: repo / "snapshots" / commit for tag, commit in COMMITS.items()}


def trained(folder: Path, start: bool | str = False) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(HUB, revision=TAG)
    config = LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", revision=TAG, init_lora_weights=start
    )
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    model.save_pretrained(folder, save_embedding_layers=False)  # else PEFT asks the hub about the vocabulary
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.usefixtures("snapshots")
def test_the_weights_are_those_of_the_revision(tmp_path: Path) -> None:
    expected = logits(trained(tmp_path / "adapter"))
    report = fold_adapter(tmp_path / "adapter", tmp_path / "merged", profile="merged")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, rtol=1e-5, atol=1e-6
    )
    assert report.probe["max_logit_error"] < 1e-5, report.probe  # type: ignore[operator]
    assert report.worst.frobenius < 1e-5


@pytest.mark.usefixtures("snapshots")
def test_the_probe_the_texts_and_the_fold_are_on_the_revision(tmp_path: Path) -> None:
    expected = logits(trained(tmp_path / "adapter", "pissa"))
    (tmp_path / "texts.txt").write_text("w1 w2 w3\n\nw4 w5")
    report = fold_adapter(
        tmp_path / "adapter", tmp_path / "out", dtype="float32", rank=8, calibration=tmp_path / "texts.txt"
    )
    assert report.probe["max_logit_error"] < 1e-5, report.probe  # type: ignore[operator]
    found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(HUB, revision=TAG), tmp_path / "out")
    torch.testing.assert_close(logits(found), expected, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["revision"] == TAG


def test_another_base_has_no_revision_of_the_adapters(snapshots: dict[str, Path], tmp_path: Path) -> None:
    trained(tmp_path / "adapter")
    shutil.copytree(snapshots[TAG], tmp_path / "base")
    fold_adapter(tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "base"))
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == (str(tmp_path / "base"), None)


@pytest.mark.usefixtures("snapshots")
def test_a_difference_names_the_revisions(tmp_path: Path) -> None:
    trained(tmp_path / "adapter")
    shutil.copytree(tmp_path / "adapter", tmp_path / "other")
    path = tmp_path / "other" / "adapter_config.json"
    path.write_text(path.read_text().replace(TAG, COMMITS[TAG]))
    notes = diff(tmp_path / "adapter", tmp_path / "other").notes
    assert notes == [f"they name different base models, {HUB}@{TAG} and {HUB}@{COMMITS[TAG]}"]
