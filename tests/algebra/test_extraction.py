"""A LoRA out of a full fine-tune: against the SVD of W_tuned − W_base in float64, what is left out, and every refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from rankfold.algebra import extract, models
from rankfold.algebra.extraction import extracted
from rankfold.algebra.models import ModelPair
from rankfold.errors import RankfoldError

TOKENS = torch.arange(5, 21)[None]
LINEAR = ("_proj.weight", "c_attn.weight", "c_proj.weight", "c_fc.weight")


def tuned(base: Path, out: Path, which: Callable[[str], bool], scale: float = 0.02, dtype=torch.float32) -> Path:
    """The base with some parameters changed at random."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if which(name):
                p.add_(torch.randn_like(p), alpha=scale)
    model.to(dtype).save_pretrained(out, max_shard_size="40KB")
    return out


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_is_the_best_of_its_rank(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    after = tuned(bases[kind], tmp_path / "tuned", lambda name: name.endswith(LINEAR))
    report = extract(bases[kind], after, tmp_path / "out", rank=6)
    weights = [AutoModelForCausalLM.from_pretrained(f).double().state_dict() for f in (bases[kind], after)]
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[kind]), tmp_path / "out").double()
    merged = lora.merge_and_unload().state_dict()
    assert {f"{p.module}.weight" for p in report.layers} == {n for n in merged if n.endswith(LINEAR)}
    for proof in report.layers:
        name = f"{proof.module}.weight"
        delta = weights[1][name] - weights[0][name]
        sigma = torch.linalg.svdvals(delta)
        best = float(sigma[6:].norm() / sigma.norm())
        error = float((merged[name] - weights[0][name] - delta).norm() / delta.norm())
        assert error == pytest.approx(best, rel=1e-4)
        assert proof.frobenius == pytest.approx(error, rel=1e-4)
        assert proof.truncation == pytest.approx(best, rel=1e-4)
    assert report.left_out == {}
    assert report.base == str(bases[kind])


def test_all_of_it_gives_the_logits_of_the_tuned_model(bases: dict[str, Path], tmp_path: Path) -> None:
    after = tuned(bases["llama"], tmp_path / "tuned", lambda name: name.endswith(LINEAR))
    report = extract(bases["llama"], after, tmp_path / "out", error=1e-9)
    assert report.rank == 32
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["llama"]), tmp_path / "out").eval()
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(after).eval()(TOKENS).logits
        torch.testing.assert_close(lora(TOKENS).logits, wanted, rtol=1e-4, atol=1e-4)


def test_only_what_changed_is_adapted_and_the_rest_is_named(bases: dict[str, Path], tmp_path: Path) -> None:
    def which(name: str) -> bool:
        return "v_proj" in name or "embed" in name or "input_layernorm" in name or "lm_head" in name

    after = tuned(bases["llama"], tmp_path / "tuned", which)
    report = extract(bases["llama"], after, tmp_path / "out", rank=4)
    assert {p.module for p in report.layers} == {f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)}
    targets = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    assert targets == ["q_proj", "v_proj"]  # SGLang wants zeros for q
    before, now = (AutoModelForCausalLM.from_pretrained(f).double().state_dict() for f in (bases["llama"], after))
    change = {n: float((now[n] - before[n]).square().sum()) for n in now}
    for kind, part in {"model.embed_tokens.weight": "embed", "lm_head.weight": "lm_head",
                       "model.layers.*.input_layernorm.weight": "input_layernorm"}.items():  # fmt: skip
        share = sum(c for n, c in change.items() if part in n) / sum(change.values())
        assert report.left_out[kind] == pytest.approx(share)
    assert set(report.left_out) == {
        "model.embed_tokens.weight", "lm_head.weight", "model.layers.*.input_layernorm.weight",
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "fold_report.json").read_text())["left_out"] == report.left_out
    note = next(n for n in report.notes if n.startswith("left out"))
    assert f"{sum(report.left_out.values()):.2%} of the change" in note
    assert "lm_head.weight" in note


def test_what_sglang_wants_beside_a_module_is_written(bases: dict[str, Path], tmp_path: Path) -> None:
    after = tuned(bases["llama"], tmp_path / "tuned", lambda name: "q_proj" in name)
    report = extract(bases["llama"], after, tmp_path / "out", rank=2)
    assert "SGLang" in report.serve
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sum("v_proj.lora_A" in key for key in keys) == 2


def test_a_base_without_its_prefix_and_a_new_head(bases: dict[str, Path], tmp_path: Path) -> None:
    """The body of a base model lacks the prefix `model.`; a classifier's new head is kept in modules_to_save."""
    LlamaModel.from_pretrained(bases["llama"]).save_pretrained(tmp_path / "body")
    model = LlamaForSequenceClassification.from_pretrained(bases["llama"], num_labels=3)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2 and p.shape[0] != 64:
                p.add_(torch.randn_like(p), alpha=0.02)
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "tuned")
    report = extract(tmp_path / "body", tmp_path / "tuned", tmp_path / "out", error=1e-9)
    assert report.left_out == {}
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["task_type"] == "SEQ_CLS"
    assert written["modules_to_save"] == ["score"]
    base = AutoModelForSequenceClassification.from_pretrained(bases["llama"], num_labels=3, pad_token_id=0)
    lora = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(lora(TOKENS).logits, model.eval()(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_the_update_is_read_a_tensor_at_a_time(bases: dict[str, Path], tmp_path: Path) -> None:
    after = tuned(bases["gpt2"], tmp_path / "tuned", lambda name: name.endswith(LINEAR), dtype=torch.bfloat16)
    source = extracted(ModelPair(str(bases["gpt2"]), str(after)))
    before, now = (AutoModelForCausalLM.from_pretrained(f, dtype="auto") for f in (bases["gpt2"], after))
    assert source.transposed
    for name in source.adapted:
        old, new = before.get_submodule(name), now.get_submodule(name)
        assert isinstance(old, Conv1D)
        assert torch.equal(source.update(name), (new.weight.double() - old.weight.double()).T)  # pyright: ignore


def randomly_changed(model: PreTrainedModel, folder: Path) -> tuple[Path, Path]:
    """A model and what training made of its two-dimensional parameters, as `save_pretrained` writes them."""
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".layers." in name and name.endswith("weight") and p.ndim == 2:
                p.add_(torch.randn_like(p), alpha=0.1)
    model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def test_files_that_name_layers_otherwise(tmp_path: Path) -> None:
    """Files of ViT have vit.encoder.layer…query, the model of transformers 5 vit.layers…q_proj."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = ViTForImageClassification(config)
    base, after = randomly_changed(model, tmp_path)
    report = extract(base, after, tmp_path / "out", error=1e-9, dtype="float32")
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {p.module for p in report.layers} == linear - {"classifier"}
    lora = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(base), tmp_path / "out").eval()
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(lora(pixels).logits, model.eval()(pixels).logits, rtol=1e-4, atol=1e-4)


def test_experts_that_transformers_fuses_are_named_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=32,
        num_local_experts=2,
    )  # fmt: skip
    base, after = randomly_changed(MixtralForCausalLM(config), tmp_path)
    path = after / "model.safetensors"
    tensors = {k: v + 0.1 if "experts" in k else v for k, v in load_file(path).items()}
    assert any("experts.1.w2" in key for key in tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    report = extract(base, after, tmp_path / "out", rank=2)
    experts = "model.layers.*.mlp.experts."
    assert {experts + "gate_up_proj", experts + "down_proj"} <= report.left_out.keys()
    assert not any(".w1" in kind for kind in report.left_out)
    for folder in (base, after):  # as transformers holds them: three-dimensional
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.save_pretrained(tmp_path / f"{folder.name}-fused", save_original_format=False)
    fused = [tmp_path / f"{folder.name}-fused" for folder in (base, after)]
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(fused[1] / "model.safetensors")
    again = extract(*fused, tmp_path / "again", rank=2)
    assert again.left_out == pytest.approx(report.left_out)
    assert any(f"{experts}gate_up_proj {report.left_out[experts + 'gate_up_proj']:.2%}" in note for note in again.notes)


def renamed(folders: tuple[Path, Path], out: Path, change: Callable[[str], str]) -> list[Path]:
    found = [out / folder.name for folder in folders]
    for folder, again in zip(folders, found, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.config.save_pretrained(again)
        tensors = {change(key): value for key, value in model.state_dict().items()}
        save_file(tensors, again / "model.safetensors", metadata={"format": "pt"})
    return found


def test_names_that_transformers_does_not_know(bases: dict[str, Path], tmp_path: Path) -> None:
    after = tuned(bases["llama"], tmp_path / "tuned", lambda name: "v_proj" in name)
    folders = renamed((bases["llama"], after), tmp_path / "odd", lambda name: f"backbone.{name}")
    with pytest.raises(
        RankfoldError, match=r"name no linear layer as transformers does \(backbone\..*, where the model has"
    ):
        extract(*folders, tmp_path / "out", rank=4)


def test_a_layer_that_transformers_makes_of_a_part(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = tuned(bases["llama"], tmp_path / "tuned", lambda name: "v_proj" in name)
    folders = renamed((bases["llama"], after), tmp_path / "odd", lambda name: name.replace("q_proj", "qkv"))
    monkeypatch.setattr(models, "to_model", lambda _: lambda name: (name.replace("qkv", "q_proj"), "qkv" in name))
    with pytest.raises(RankfoldError, match=r"makes \S*q_proj.weight of a part of \S*qkv.weight when it loads"):
        extract(*folders, tmp_path / "out", rank=4)


def test_refusals(bases: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    after = tuned(bases["llama"], tmp_path / "tuned", lambda name: "v_proj" in name)
    with pytest.raises(RankfoldError, match=r"with --rank N, or how near .* --error"):
        extract(bases["llama"], after, out)
    with pytest.raises(RankfoldError, match="have the same weights; there is nothing to extract"):
        extract(bases["llama"], bases["llama"], out, rank=4)
    with pytest.raises(RankfoldError, match=r"is a llama and .*gpt2 a gpt2; give two models of one type"):
        extract(bases["llama"], bases["gpt2"], out, rank=4)
    with pytest.raises(RankfoldError, match="not of one architecture"):
        extract(bases["llama"], bases["wide"], out, rank=4)
    norms = tuned(bases["llama"], tmp_path / "norms", lambda name: "norm" in name)
    with pytest.raises(RankfoldError, match=r"no linear layer differs .*only model\..*norm\.weight and 2 more"):
        extract(bases["llama"], norms, out, rank=4)
    broken = tuned(bases["llama"], tmp_path / "broken", lambda name: "v_proj" in name, scale=float("nan"))
    with pytest.raises(RankfoldError, match=r"v_proj\.weight is not finite; the model is damaged"):
        extract(bases["llama"], broken, out, rank=4)
    with pytest.raises(RankfoldError, match=r"out=.* holds"):
        extract(bases["llama"], after, after, rank=4, force=True)
    assert not out.exists()
