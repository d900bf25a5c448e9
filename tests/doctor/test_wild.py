"""What is said of adapters that people really have, and the copy that `--fix` writes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from edits import edit_config, edit_tensors, sound
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from rankfold import PlainLoraConfig, RasaConfig, cli
from rankfold.doctor import Status, diagnose
from rankfold.doctor.fix import fix
from rankfold.fold import fold_adapter

ELSEWHERE = ("vllm-old", "sglang", "llama.cpp", "ollama", "tgi", "lorax", "openvino", "mistral.rs", "lmdeploy")


def verdicts(folder: Path, **options: Any) -> dict[str, Status]:
    return {v.engine.key: v.status for v in diagnose(folder, **options).verdicts}


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_16", "corda", "loftq", "lora_ga"])
def test_an_unconverted_start_is_wrong_but_in_peft(start: str, adapter: Any) -> None:
    """The base that other engines have is not the one that PEFT makes at every load."""
    folder = adapter()
    edit_config(folder, init_lora_weights=start)
    found = verdicts(folder)
    assert {found[key] for key in ELSEWHERE if key != "mistral.rs"} == {Status.WRONG}
    assert found["mistral.rs"] is Status.REFUSED
    assert found["vllm"] in (Status.REFUSED, Status.WRONG)
    lacking = start in ("corda", "loftq")  # what its start computed, or was told, which PEFT asks for at every load
    assert found["peft"] is (Status.REFUSED if lacking else Status.LOADS), [
        v.findings for v in diagnose(folder, engines=["peft"]).verdicts
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda k: k.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda k: k.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
        lambda k: k.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
        lambda k: "base_model.model." + k,
    ],
)
def test_names_of_wrappers_are_known_without_a_base(change: Any, adapter: Any, llama: Path, tmp_path: Path) -> None:
    folder = adapter()
    before = load_file(folder / "adapter_model.safetensors")
    edit_config(folder, base_model_name_or_path=None)
    edit_tensors(folder, lambda t: {change(k): v for k, v in t.items()})
    found = diagnose(folder)
    assert any("names of wrappers" in f.what for f in found.problems)
    status = {v.engine.key: v.status for v in found.verdicts}
    assert {status[k] for k in ("peft", "vllm", "sglang")} == {Status.IN_PART}
    assert status["llama.cpp"] is Status.REFUSED
    (sentence,) = fix(folder, tmp_path / "fixed")
    assert sentence.startswith("keys renamed")
    assert load_file(tmp_path / "fixed" / "adapter_model.safetensors").keys() == before.keys()
    assert sound(diagnose(tmp_path / "fixed", base=llama))


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("change", [
    lambda key: key.removeprefix("base_model.model."),
    lambda key: key.replace(".lm_head.", ".lm_head.modules_to_save.default."),
    lambda key: key.replace(".lm_head.", ".lm_head.modules_to_save."),
], ids=["no prefix", "state dict", "state dict, no name"])  # fmt: skip
def test_a_head_that_peft_does_not_find(change: Any, ours: bool, adapter: Any, llama: Path, tmp_path: Path) -> None:
    """PEFT stops with a KeyError; the mended copy and the fold load, with the head."""
    folder, base = adapter(modules_to_save=["lm_head"]), LlamaForCausalLM.from_pretrained(llama)
    if ours:
        config = PlainLoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
        get_peft_model(copy.deepcopy(base), config).save_pretrained(folder)
    head = torch.ones_like(base.lm_head.weight)
    edit_tensors(folder, lambda t: {k: head if "lm_head" in k else v for k, v in t.items()})
    edit_tensors(folder, lambda t: {change(k) if "lm_head" in k or not ours else k: v for k, v in t.items()})
    with pytest.raises(KeyError):
        PeftModel.from_pretrained(copy.deepcopy(base), folder)
    if not ours:  # of which the doctor says that it is not a LoRA
        assert verdicts(folder)["peft"] is Status.REFUSED
        said = [f.what for f in diagnose(folder).problems]
        assert any("modules_to_save names lm_head, whose tensors are not under PEFT's name" in w for w in said)
    fix(folder, tmp_path / "fixed")
    fold_adapter(folder, tmp_path / "fold", probe=False)
    for found in ("fixed", "fold"):
        loaded: Any = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / found)
        assert torch.equal(loaded.base_model.model.lm_head.modules_to_save["default"].weight, head)


def test_fix_writes_the_tensors_of_a_pickle_as_safetensors(adapter: Any, tmp_path: Path) -> None:
    folder = adapter()
    trained = load_file(folder / "adapter_model.safetensors")
    torch.save(trained, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert "--fix OUT" in diagnose(folder).problems[0].fix
    (sentence,) = fix(folder, tmp_path / "fixed")
    assert "held tensors alone, written as adapter_model.safetensors" in sentence
    assert not (tmp_path / "fixed" / "adapter_model.bin").exists()
    found = load_file(tmp_path / "fixed" / "adapter_model.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in trained.items())


def test_fix_writes_a_pickle_of_tied_tensors(adapter: Any, tmp_path: Path) -> None:
    """torch's pickles keep them in one memory, which safetensors refuses."""
    folder = adapter()
    trained, head = load_file(folder / "adapter_model.safetensors"), torch.ones(64, 32)
    trained |= {"base_model.model.model.embed_tokens.weight": head, "base_model.model.lm_head.weight": head}
    torch.save(trained, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    edit_config(folder, modules_to_save=["embed_tokens", "lm_head"])
    fix(folder, tmp_path / "fixed")
    assert load_file(tmp_path / "fixed" / "adapter_model.safetensors").keys() == trained.keys()


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
@pytest.mark.parametrize(
    ("kind", "old", "new", "targets", "status"),
    [
        ("vit", "vit.encoder.layer.0.attention.attention.query", "vit.layers.0.attention.q_proj", ["query"], "refused"),
        ("vit", "vit.encoder.layer.0.attention.attention.query", "vit.layers.0.attention.q_proj", ["query", "q_proj"], "loads in part"),
        ("gemma3", "language_model.model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj", ["q_proj"], "loads"),
        ("gemma3", "language_model.model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj", "language_model.model.*q_proj", "refused"),
    ],
)  # fmt: skip
def test_modules_that_transformers_has_renamed(
    kind: str, old: str, new: str, targets: Any, status: str, tmp_path: Path
) -> None:
    """Of some models PEFT renames the tensors with them, of none the target_modules."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    image = {**small, "image_size": 8, "patch_size": 4}
    text = {**small, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300}
    model: Any = (
        ViTForImageClassification(ViTConfig(**image))
        if kind == "vit"
        else Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=image, mm_tokens_per_image=1))
    )
    model.save_pretrained(tmp_path / "base")
    LoraConfig(target_modules=targets, base_model_name_or_path=str(tmp_path / "base")).save_pretrained(tmp_path / "a")
    key, tensors = f"base_model.model.{old}", {"lora_A": torch.randn(8, 16), "lora_B": torch.randn(16, 8)}
    save_file({f"{key}.{end}.weight": t for end, t in tensors.items()}, tmp_path / "a" / "adapter_model.safetensors")
    assert verdicts(tmp_path / "a")["peft"] == status
    base = type(model).from_pretrained(tmp_path / "base")
    if status == "refused":
        with pytest.raises(ValueError, match="not found in the base model"):
            PeftModel.from_pretrained(base, tmp_path / "a")
        return
    loaded: Any = PeftModel.from_pretrained(base, tmp_path / "a").base_model.model.get_submodule(new)
    assert loaded.lora_B["default"].weight.any() == (status == "loads")


@pytest.mark.parametrize("pickled", [False, True])
def test_fix_widens_float8(pickled: bool, adapter: Any, tmp_path: Path) -> None:
    folder = adapter()
    edit_tensors(folder, lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()})
    narrow = load_file(folder / "adapter_model.safetensors")
    if pickled:
        torch.save(narrow, folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    assert fix(folder, tmp_path / "fixed")[-1] == "all tensors in float32; they were float8_e4m3fn"
    found = load_file(tmp_path / "fixed" / "adapter_model.safetensors")
    assert all(torch.equal(found[key], tensor.float()) for key, tensor in narrow.items())
    assert not diagnose(tmp_path / "fixed").problems


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "changes",
    [
        {"task_type": "text-generation"}, {"layers_pattern": "layers"}, {"target_modules": ".*q_proj", "layers_to_transform": [0]},
        {"layers_to_transform": [9]}, {"target_modules": ["query"]}, {"target_modules": []}, {"lora_alpha": None}, {"r": None},
        {"lora_dropout": None}, {"bias": None}, {"bias": "some"}, {"init_lora_weights": "corda"}, {"init_lora_weights": "loftq"},
        {"init_lora_weights": "other"}, {"peft_type": None}, {"peft_type": "ADALORA"}, {"rank_pattern": None},
        {"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_2"}, {"init_lora_weights": "orthogonal"}, {"use_dora": True},
        {"init_lora_weights": None}, {"runtime_config": {}}, {"of_the_future": 1}, {"target_modules": "all-linear"}, {"target_modules": None},
        {"exclude_modules": ["v_proj"]}, {"layers_to_transform": [0]}, {"task_type": None}, {"bias": "all"}, {"lora_bias": True},
    ],
    ids=str,
)  # fmt: skip
def test_peft_is_said_to_refuse_what_it_refuses(changes: dict[str, Any], adapter: Any, llama: Path) -> None:
    folder = adapter()
    edit_config(folder, **changes)
    said = verdicts(folder, base=llama, engines=["peft"])["peft"]
    try:
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), folder)
        real = "loads in part" if {"exclude_modules", "layers_to_transform"} & changes.keys() else "loads"
    except Exception:
        real = "refused"
    assert said == real


def test_fix_writes_what_engines_and_peft_read(adapter: Any, llama: Path, tmp_path: Path, capsys: Any) -> None:
    folder = adapter()
    trained = load_file(folder / "adapter_model.safetensors")
    edit_config(folder, lora_alpha=16.0, rank_pattern=None)
    edit_tensors(
        folder,
        lambda t: {k.replace(".weight", ".default.weight"): v.double() if "_A" in k else v for k, v in t.items()},
    )
    assert verdicts(folder)["vllm"] is Status.REFUSED
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    out = tmp_path / "fixed"
    assert cli.main(["doctor", str(folder), "--engine", "vllm,peft", "--fix", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "mended: keys renamed" in printed
    assert "lora_alpha 16.0 written as 16" in printed
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    found = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in trained.items())
    PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), out)
    with pytest.raises(FileExistsError):
        fix(folder, out)
    with pytest.raises(ValueError, match="nothing that can be mended"):
        fix(out, tmp_path / "again")


@pytest.mark.parametrize("targets", [["q_proj"], ["k_proj"], ["v_proj"], ["up_proj"]])
def test_sglang_wants_siblings_and_the_fold_writes_them(targets: list[str], adapter: Any, tmp_path: Path) -> None:
    """sglang #25913: KeyError v_proj."""
    folder = adapter(target_modules=targets)
    assert verdicts(folder)["sglang"] is Status.REFUSED
    fold_adapter(folder, tmp_path / "out", probe=True)
    assert verdicts(tmp_path / "out")["sglang"] is Status.LOADS


def test_engines_that_read_no_alpha_or_no_rslora(adapter: Any, tmp_path: Path) -> None:
    found = verdicts(adapter(r=8, lora_alpha=32))
    assert found["openvino"] is Status.MIS_SCALED  # openvino.genai #2210
    assert found["mistral.rs"] is found["lmdeploy"] is found["lorax"] is Status.LOADS
    found = verdicts(adapter(r=16, lora_alpha=16, use_rslora=True))
    assert found["tgi"] is Status.LOADS
    assert {found[key] for key in ("lorax", "lmdeploy")} == {Status.MIS_SCALED}  # LoRAX pins peft 0.4.0
    fold_adapter(adapter(use_rslora=True), tmp_path / "out", probe=False)
    found = verdicts(tmp_path / "out")
    assert {found[key] for key in ELSEWHERE if key != "ollama"} == {Status.LOADS}


def test_what_peft_stops_at(adapter: Any) -> None:
    folder = adapter()
    edit_config(folder, rank_pattern=None)
    assert verdicts(folder)["peft"] is Status.REFUSED
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["peft_type"], config["rank_pattern"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = verdicts(folder)
    assert found["peft"] is found["sglang"] is Status.REFUSED


def test_names_of_a_multimodal_model_without_a_base(adapter: Any) -> None:
    folder = adapter()
    edit_config(folder, base_model_name_or_path=None)
    edit_tensors(folder, lambda t: {k.replace("model.layers", "model.language_model.layers"): v for k, v in t.items()})
    assert verdicts(folder)["peft"] is Status.NOT_CHECKED


def test_a_base_that_has_theta_in_new_keys_alone(adapter: Any, llama: Path, tmp_path: Path) -> None:
    """mlx-lm takes 10000 in its place."""
    config = json.loads((llama / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 100000.0, "rope_type": "default"}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    found = diagnose(adapter(), base=tmp_path / "base")
    assert any("rope_theta=100000.0 in rope_parameters alone" in f.what for f in found.findings)
    assert any("missing field rope_theta" in f.what for v in found.verdicts for f in v.findings)


def test_norms_and_heads_in_sglang(adapter: Any) -> None:
    assert verdicts(adapter(modules_to_save=["norm"]))["sglang"] is Status.REFUSED
    assert verdicts(adapter(modules_to_save=["lm_head"]))["sglang"] is Status.IN_PART


def test_the_rank_of_a_method_that_shares_is_its_config_s(llama: Path, tmp_path: Path) -> None:
    """RaSA with r = 4 has 3 private components in each module, and a pool."""
    config = RasaConfig(r=4, shared_rank=1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(LlamaForCausalLM.from_pretrained(llama), config).save_pretrained(tmp_path)
    assert "r=4 (rank 3 in each module's own factors; what modules share is not counted)" in diagnose(tmp_path).summary


def test_target_parameters_are_no_problem(tmp_path: Path) -> None:
    """PEFT loads them, vLLM has classes that do, the GGUF converter stops; what others do was not tried."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = MixtralForCausalLM(MixtralConfig(**small, num_key_value_heads=2, vocab_size=64, num_local_experts=2))
    base.save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    base.name_or_path = str(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **options)).save_pretrained(
        tmp_path / "a"
    )
    assert not diagnose(tmp_path / "a", base=tmp_path / "base").problems
    found = verdicts(tmp_path / "a", base=tmp_path / "base")
    assert found["peft"] is Status.LOADS
    assert {found[key] for key in ("llama.cpp", "ollama", "vllm-old")} == {Status.REFUSED}
    assert {found[key] for key in ("vllm", "sglang", "mistral.rs", "lmdeploy")} == {Status.NOT_CHECKED}
