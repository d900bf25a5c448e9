"""Folding: what stock PEFT makes of the fold, the contract of field.md §3.3, the proof, and every bad input."""

from __future__ import annotations

import json
import os
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from rankfold import PlainLoraConfig, RasaConfig, SoraConfig
from rankfold.fold import fold_adapter, fold_model, read_source
from rankfold.fold.profiles.uniform import serve_rank, target_suffixes
from rankfold.fold.proof import prove
from rankfold.io.files import whole_folder

TOKENS = torch.arange(5, 21)[None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def trained(base: Path, config, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """An adapter folder with random weights, and the logits of its model."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), deepcopy(config)).eval()
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        return tmp_path / "adapter", model(TOKENS).logits


def rasa(**kwargs) -> RasaConfig:
    defaults = {"r": 4, "shared_rank": 2, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return RasaConfig(init_lora_weights=False, **{**defaults, **kwargs})


CONFIGS = {
    "rasa": rasa(),
    "rasa q,v of two layers": rasa(target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 2]),
    "lora, ranks differ": PlainLoraConfig(
        r=4,
        rank_pattern={"q_proj": 2, "down_proj": 9},
        alpha_pattern={"q_proj": 3},
        use_rslora=True,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    ),
    "sora": SoraConfig(
        target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, allow_unscheduled=True
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_stock_peft_gives_the_same_logits(name: str, llama: Path, tmp_path: Path) -> None:
    adapter, logits = trained(llama, CONFIGS[name], tmp_path)
    report = fold_adapter(adapter, tmp_path / "out")
    folded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(folded(TOKENS).logits, logits, rtol=1e-5, atol=1e-5)
    assert report.worst.frobenius < 1e-6
    assert max(p.algebra for p in report.layers) < 1e-14
    assert report.probe["max_logit_error"] < 1e-4  # type: ignore[operator]
    assert report.probe["same_argmax"]


def test_the_contract_to_the_letter(llama: Path, tmp_path: Path) -> None:
    """field.md §3.3, items 1 to 11."""
    adapter, _ = trained(llama, CONFIGS["rasa q,v of two layers"], tmp_path)
    report = fold_adapter(adapter, tmp_path / "out", probe=False)
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "fold_report.json",
    }  # fmt: skip
    config = json.loads((out / "adapter_config.json").read_text())
    tensors = load_file(out / "adapter_model.safetensors")
    modules = [f"model.layers.{i}.self_attn.{p}" for i in range(3) for p in ("q_proj", "v_proj")]
    assert set(tensors) == {f"base_model.model.{m}.lora_{f}.weight" for m in modules for f in "AB"}
    assert {t.shape[0] for k, t in tensors.items() if "lora_A" in k} == {report.rank} == {8}
    assert {t.shape[1] for k, t in tensors.items() if "lora_B" in k} == {8}
    assert not any(tensors[f"base_model.model.{m}.lora_A.weight"].any() for m in modules if ".1." in m)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert config["r"] == config["lora_alpha"] == 8
    assert isinstance(config["lora_alpha"], int)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == str(llama)
    assert config["task_type"] == "CAUSAL_LM"
    falsy = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "layer_replication")
    assert not any(config[k] for k in falsy)
    assert config["init_lora_weights"] is True
    written = json.loads((out / "fold_report.json").read_text())
    assert written["worst_frobenius"] == report.worst.frobenius
    assert "--max-lora-rank 8" in written["serve"]["vLLM"]
    assert "2 modules" in written["notes"][0]


def test_balanced_factors_survive_half_precision(llama: Path, tmp_path: Path) -> None:
    """A huge B beside a tiny A would overflow float16; balanced they only round."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), deepcopy(CONFIGS["rasa"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.mul_(1e6 if name.endswith("up") else 1e-6 if name.endswith("down") else 1.0)
    report = fold_model(model, tmp_path / "out", dtype="float16")
    assert report.dtype == "float16"
    assert report.worst.frobenius < 2e-3
    assert max(p.algebra for p in report.layers) < 1e-13


def test_conv1d(tmp_path: Path) -> None:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)).save_pretrained(tmp_path / "base")
    config = rasa(target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)
    adapter, logits = trained(tmp_path / "base", config, tmp_path)
    fold_adapter(adapter, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert stored["target_modules"] == ["c_attn", "mlp.c_proj"]
    folded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(folded(TOKENS).logits, logits, rtol=1e-5, atol=1e-5)


def test_a_classifier_keeps_its_head_in_stock_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    BertModel(config).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    model = get_peft_model(base, rasa(target_modules=["query", "attention.output.dense"], task_type="SEQ_CLS")).eval()
    model.save_pretrained(tmp_path / "adapter")
    report = fold_adapter(tmp_path / "adapter", tmp_path / "out")
    assert report.probe["max_logit_error"] < 1e-5  # type: ignore[operator]
    torch.manual_seed(1)  # another head
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    folded = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert type(folded.peft_config["default"]) is LoraConfig
    with torch.no_grad():
        torch.testing.assert_close(folded(TOKENS).logits, model(TOKENS).logits)


def test_a_dead_module_is_written_as_zeros(llama: Path, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), deepcopy(CONFIGS["sora"])).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gate"):
                p[:6] = 0
                if "layers.1.self_attn" in name:
                    p.zero_()
    report = fold_model(model, tmp_path / "out", pad="none")
    with pytest.raises(ValueError, match="pad='none' is of profile uniform"):
        fold_model(model, tmp_path / "other", pad="none", profile="compact")
    assert report.rank == 2
    dead = [p for p in report.layers if "layers.1.self_attn" in p.module]
    assert all(p.rank == 0 and p.frobenius == 0 for p in dead)
    assert len(dead) == 4
    folded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(folded(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_the_proof_sees_a_wrong_fold() -> None:
    from rankfold.kernel.factors import Factors

    good = Factors(torch.randn(3, 8, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64))
    bad = Factors(good.down, good.up * 1.01)
    proof = prove("m", good, good, bad)
    assert proof.frobenius == pytest.approx(0.01, rel=1e-6)
    assert proof.max == pytest.approx(0.01, rel=1e-4)


def test_serve_rank() -> None:
    assert [serve_rank(r) for r in (0, 1, 8, 9, 156, 300, 512, 600)] == [8, 8, 8, 16, 256, 320, 512, 600]
    assert serve_rank(39, "none") == 39
    with pytest.raises(ValueError, match="pad='x'"):
        serve_rank(3, "x")


def test_target_suffixes_never_match_more() -> None:
    modules = ["a.0.q", "a.0.out.dense", "a.0.dense", "pooler.dense"]
    assert target_suffixes(["a.0.q", "a.0.out.dense"], modules) == ["out.dense", "q"]
    assert target_suffixes(["dense"], ["dense", "x.dense"]) == ["dense"]


# Bad input: one clear error, and nothing is written -----------------------------------------------------------------


def damage_truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_nan(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")


def damage_missing(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.popitem()
    save_file(tensors, folder / "adapter_model.safetensors")


def damage_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": ')


def damage_type(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')


def damage_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def damage_base(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/nowhere"}))


def damage_empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "truncated"),
        (damage_nan, "NaN or infinity in"),
        (damage_missing, "lacks 1 of"),
        (damage_json, "not valid"),
        (damage_type, "peft_type=IA3 cannot be folded"),
        (damage_pickle, "not a pickle of tensors alone"),
        (damage_base, "--base FOLDER"),
        (damage_empty, "no adapter_config.json"),
    ],
)
def test_damaged_adapters(damage, message: str, llama: Path, tmp_path: Path) -> None:
    adapter, _ = trained(llama, CONFIGS["rasa"], tmp_path)
    damage(adapter)
    with pytest.raises(ValueError, match=message):
        fold_adapter(adapter, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_another_base_is_refused(llama: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=64)
    ).save_pretrained(other)
    adapter, _ = trained(llama, CONFIGS["rasa"], tmp_path)
    with pytest.raises(ValueError, match="another base model"):
        read_source(adapter, str(other))


@pytest.mark.parametrize("profile", ["uniform", "merged"])
def test_force_replaces_a_fold_and_nothing_else(profile: str, llama: Path, tmp_path: Path) -> None:
    adapter, _ = trained(llama, CONFIGS["rasa"], tmp_path)
    out = tmp_path / "out"
    fold_adapter(adapter, out, probe=False, profile=profile)
    with pytest.raises(FileExistsError, match="--force"):
        fold_adapter(adapter, out, probe=False)
    fold_adapter(adapter, out, probe=False, force=True)
    (out / "notes").mkdir()
    (out / "notes" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match=r"holds notes.thesis\.txt, which was not written by a fold"):
        fold_adapter(adapter, out, probe=False, force=True)
    with pytest.raises(FileExistsError, match=r"holds notes.thesis\.txt"):
        fold_model(get_peft_model(AutoModelForCausalLM.from_pretrained(llama), rasa()), out, force=True)
    (out / "fold_report.json").unlink()
    with pytest.raises(FileExistsError, match=r"holds README\.md"):
        fold_adapter(adapter, out, probe=False, force=True)
    with pytest.raises(FileExistsError, match="is a file"):
        fold_adapter(adapter, out / "README.md", probe=False, force=True)
    assert (out / "notes" / "thesis.txt").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "out"]


def test_a_full_disk_leaves_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, _ = trained(llama, CONFIGS["rasa"], tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rankfold.fold.profiles.uniform.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        fold_adapter(adapter, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_an_unscheduled_adapter_is_refused(llama: Path, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), SoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="schedule"):
        fold_model(model, tmp_path / "out")


@pytest.mark.parametrize("out", [".", "adapter", "../base"])
def test_force_never_deletes_what_a_fold_is_made_from(out: str, llama: Path, tmp_path: Path) -> None:
    run, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(llama, base)
    run.mkdir()
    adapter, _ = trained(base, CONFIGS["rasa"], run)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="itself, which the fold would replace"):
        fold_adapter(adapter, run / out, probe=False, force=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_no_adapter_folder(llama: Path, tmp_path: Path) -> None:
    adapter, _ = trained(llama, CONFIGS["rasa"], tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        fold_adapter(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "other").write_text("x")
    with pytest.raises(ValueError, match="is a file; give the folder"):
        fold_adapter(tmp_path / "other", tmp_path / "out")
    (tmp_path / "below").mkdir()
    adapter.rename(tmp_path / "below" / "french")  # where PEFT saves an adapter of that name
    with pytest.raises(ValueError, match=r"has no adapter_config\.json; there is one in .*french"):
        fold_adapter(tmp_path / "below", tmp_path / "out")


@pytest.mark.parametrize("given", [".", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"])
def test_a_run_and_a_file_in_the_adapter_mean_the_adapter(given: str, llama: Path, tmp_path: Path) -> None:
    trained(llama, CONFIGS["rasa"], tmp_path / "run")
    report = fold_adapter(tmp_path / "run" / given, tmp_path / "out", probe=False)
    assert report.adapter == str(tmp_path / "run" / "adapter")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
def test_a_fold_can_be_read_by_those_who_may_read_other_files(llama: Path, tmp_path: Path) -> None:
    adapter, _ = trained(llama, CONFIGS["rasa"], tmp_path)
    plain = tmp_path / "plain"
    plain.touch()
    fold_adapter(adapter, tmp_path / "out", probe=False)
    assert {p.stat().st_mode for p in (tmp_path / "out").iterdir()} == {plain.stat().st_mode}


def test_a_folder_that_cannot_be_renamed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(OSError, match="busy"), whole_folder(Path(), force=True) as folder:
        (folder / "new").write_text("y")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "precious"]
