"""What is wrong with the file itself: numbers, shapes, names, config, base, damage."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from edits import edit_config, edit_tensors, sound
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from rankfold import PlainLoraConfig, RasaConfig
from rankfold.doctor import Diagnosis, Status, diagnose
from rankfold.doctor.base_shapes import read_base

V = "base_model.model.model.layers.1.self_attn.v_proj."


def problems(found: Diagnosis) -> str:
    return " | ".join(f"{f.what} [{f.where}]" for f in found.problems)


def notes(found: Diagnosis) -> str:
    return " | ".join(f.what for f in found.findings if f not in found.problems)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(adapter, value: float):
    folder = adapter()

    def spoil(tensors):
        tensors[V + "lora_B.weight"][3, 2] = value
        return tensors

    edit_tensors(folder, spoil)
    found = diagnose(folder)
    assert "NaN or infinity in 1 of 12 tensors" in problems(found)
    assert V + "lora_B.weight" in problems(found)
    assert not found.healthy


def test_an_untrained_adapter(adapter):
    assert "every B (up) is zero" in problems(diagnose(adapter(init_lora_weights=True)))


def test_zeros_in_some_modules_are_fine(adapter):
    folder = adapter()
    edit_tensors(folder, lambda t: {k: v * (k != V + "lora_B.weight") for k, v in t.items()})
    assert sound(diagnose(folder))


def test_dtypes(adapter):
    folder = adapter()
    edit_tensors(folder, lambda t: {k: v.bfloat16() if "lora_A" in k else v for k, v in t.items()})
    found = diagnose(folder)
    assert "dtypes are mixed (BF16, F32)" in notes(found)
    assert sound(found)
    edit_tensors(folder, lambda t: {k: v.double() for k, v in t.items()})
    assert "float64" in notes(diagnose(folder))
    edit_tensors(folder, lambda t: {k: (v * 100).to(torch.int8) for k, v in t.items()})
    assert "dtype I8" in problems(diagnose(folder))
    edit_tensors(folder, lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()})
    assert "dtype F8_E4M3" in problems(diagnose(folder))


def test_tensors_that_do_not_belong(adapter):
    folder = adapter()
    edit_tensors(folder, lambda t: {**t, "lm_head.weight_scale": torch.ones(2)})
    assert "tensors that do not belong in a LoRA: lm_head.weight_scale" in problems(diagnose(folder))
    edit_tensors(folder, lambda t: {k.replace("lora_A.", "lora_A.default."): v for k, v in t.items()})
    found = diagnose(folder)  # one of them holds the adapter's name: PEFT alone reads it
    assert "hold the adapter's name" in notes(found)
    assert "do not belong" in problems(found)


def test_a_rank_that_the_config_denies(adapter):
    folder = adapter()
    edit_config(folder, r=4)
    found = diagnose(folder)
    assert "r gives model.layers.0.self_attn.q_proj rank 4, its tensors have rank 8 (6 of 6" in problems(found)
    assert "adapter_config.json:" in problems(found)
    assert {v.engine.key: v.status for v in found.verdicts}["peft"] == "refused"
    assert {v.status for v in found.verdicts if v.engine.key in ("vllm", "tgi")} == {"not checked"}


def test_factors_that_do_not_fit_each_other(adapter):
    folder = adapter()
    edit_tensors(folder, lambda t: {**t, V + "lora_B.weight": t[V + "lora_B.weight"][:, :5].contiguous()})
    assert "different ranks" in problems(diagnose(folder))
    edit_tensors(folder, lambda t: {**t, V + "lora_B.weight": torch.ones(3)})
    assert "are not matrices" in problems(diagnose(folder))
    edit_tensors(folder, lambda t: {**t, V + "lora_A.weight": torch.ones(0, 32)})
    assert "rank 0" in problems(diagnose(folder))


def test_a_convolution_with_groups_fits(tmp_path: Path):
    """PEFT's B of it has the rank of one group in its columns."""
    model = torch.nn.Sequential(torch.nn.Conv1d(8, 8, 3, groups=4), torch.nn.Conv1d(8, 8, 3))
    with pytest.warns(UserWarning, match="groups > 1"):
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False))  # type: ignore[arg-type]
    adapted.save_pretrained(tmp_path)
    assert not diagnose(tmp_path).problems
    key = "base_model.model.1.lora_B.weight"
    edit_tensors(tmp_path, lambda t: {**t, key: t[key][:, :3].contiguous()})
    assert "different ranks" in problems(diagnose(tmp_path))


def test_targets_and_tensors_disagree(adapter):
    folder = adapter()
    edit_config(folder, target_modules=["q_proj", "v_proj", "o_proj"])
    assert "target_modules that match no tensor: o_proj" in problems(diagnose(folder))
    edit_config(folder, target_modules=["q_proj"])
    assert "does not name (PEFT would drop them): model.layers.0.self_attn.v_proj" in problems(diagnose(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers_to_transform": [0]}, "target_modules with layers_to_transform does not name (PEFT would drop them): model.layers.1"),
        ({"layers_to_transform": 1, "layers_pattern": "layers"}, "(PEFT would drop them): model.layers.0"),
        ({"exclude_modules": ["v_proj"]}, "target_modules with exclude_modules does not name (PEFT would drop them)"),
        ({"exclude_modules": r".*layers\.0.*"}, "(PEFT would drop them): model.layers.0"),
        ({"layers_to_transform": "first"}, "layers_to_transform='first' must be a number or a list of numbers"),
    ],
    ids=str,
)  # fmt: skip
def test_what_peft_leaves_out(adapter, change, message: str):
    folder = adapter()
    edit_config(folder, **change)
    assert message in problems(diagnose(folder))
    edit_config(folder, layers_to_transform=[0, 1, 2], layers_pattern=None, exclude_modules=["lm_head"])
    assert not diagnose(folder).problems


def test_a_head_that_is_absent(adapter):
    folder = adapter()
    edit_config(folder, modules_to_save=["score"])
    assert "modules_to_save names score" in problems(diagnose(folder))


def test_a_classifier_of_stock_peft(tmp_path: Path):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "base")
    base = LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
    lora = LoraConfig(r=8, target_modules=["q_proj"], task_type=TaskType.SEQ_CLS, init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    assert problems(diagnose(tmp_path / "adapter")) == ""  # PEFT lists both "classifier" and "score", and one exists


def test_the_bias_of_a_head_belongs_to_the_head(adapter):
    folder = adapter()
    edit_config(folder, modules_to_save=["classifier", "score"])
    head = {"classifier.weight": torch.ones(3, 32), "classifier.bias": torch.ones(3)}
    edit_tensors(folder, lambda t: t | {f"base_model.model.{k}": v for k, v in head.items()})
    found = diagnose(folder, engines=["vllm"])
    assert found.verdicts[0].status == "loads"


def test_keys_of_the_future(adapter):
    folder = adapter()
    edit_config(folder, use_magic=True)
    found = diagnose(folder)
    assert "keys that PEFT 0.21 does not know: use_magic" in notes(found)
    assert sound(found)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", "eight"), ("r", 0), ("r", True), ("lora_alpha", None.__class__.__name__), ("rank_pattern", {"q_proj": -1}),
        ("rank_pattern", {"(": 4}), ("alpha_pattern", []), ("target_modules", "("), ("target_modules", [1]),
        ("use_rslora", "yes"), ("modules_to_save", "score"), ("peft_type", 3), ("lora_alpha", float("inf")),
    ],
)  # fmt: skip
def test_values_of_the_wrong_type(adapter, key: str, value):
    folder = adapter()
    edit_config(folder, **{key: value})
    assert f"{key}=" in problems(diagnose(folder))
    assert f"({key})" in problems(diagnose(folder))


def test_another_base(adapter, llama: Path, tmp_path: Path):
    folder = adapter()
    config = json.loads((llama / "config.json").read_text())
    for name, changes in {"wide": {"hidden_size": 64, "head_dim": 16}, "short": {"num_hidden_layers": 2}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **changes}))
    found = diagnose(folder, base=tmp_path / "wide")
    assert "the update of model.layers.0.self_attn.q_proj is 32×32, but the base's module is 64×64" in problems(found)
    found = diagnose(folder, base=tmp_path / "short")
    assert "2 of 6 adapted modules are not in the base" in problems(found)
    assert sound(diagnose(folder, base=llama))


def test_another_base_of_an_adapter_of_ours(llama: Path, tmp_path: Path):
    config = RasaConfig(r=4, shared_rank=1, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(LlamaForCausalLM.from_pretrained(llama), config).save_pretrained(tmp_path / "adapter")
    found = diagnose(tmp_path / "adapter", base=llama)
    assert found.problems == []
    assert "3 modules" in found.summary
    base = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**base, "num_hidden_layers": 1}))
    assert "2 of 3 adapted modules are not in the base" in problems(diagnose(tmp_path / "adapter", base=tmp_path))


@pytest.mark.parametrize("config", [LoraConfig, PlainLoraConfig])
def test_convolutions_and_embeddings_are_in_their_base(config: type, llama: Path, tmp_path: Path):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    vit = ViTModel(ViTConfig(**small, image_size=16, patch_size=8))
    vit.save_pretrained(tmp_path / "vit")
    for base, target, name in (
        (vit, "projection", "vit"),
        (LlamaForCausalLM.from_pretrained(llama), "embed_tokens", ""),
    ):
        base.name_or_path = str(tmp_path / name if name else llama)
        model = get_peft_model(base, config(r=4, target_modules=[target], init_lora_weights=False))
        model.save_pretrained(tmp_path / target, save_embedding_layers=False)
        assert problems(diagnose(tmp_path / target)) == ""
    shutil.copy(llama / "config.json", tmp_path / "vit")
    assert "not in the base" in problems(diagnose(tmp_path / "projection"))


def test_an_attention_of_torch(tmp_path: Path):
    """PEFT writes the factors of in_proj_weight under the attention's name, and those of out_proj under base_layer.out_proj."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    base = SiglipVisionModel(SiglipVisionConfig(**small, image_size=8, patch_size=4))
    base.save_pretrained(tmp_path / "siglip")
    base.name_or_path = str(tmp_path / "siglip")
    config = LoraConfig(
        r=4, target_modules=["head.attention"], rank_pattern={"head.attention": 2}, init_lora_weights=False
    )
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    found = diagnose(tmp_path / "adapter")
    assert problems(found) == ""
    assert "2 modules" in found.summary
    shapes = read_base(tmp_path / "siglip", {})
    assert shapes.shape("head.attention") == (48, 16)
    assert shapes.shape("head.attention.base_layer.out_proj") == (16, 16)


def test_a_resized_vocabulary(adapter, llama: Path):
    folder = adapter()
    for name in ("model.embed_tokens", "lm_head"):
        edit_tensors(folder, lambda t, n=name: {**t, f"base_model.model.{n}.weight": torch.ones(64, 32)})
        assert diagnose(folder, engines=["peft"]).healthy
        edit_tensors(folder, lambda t, n=name: {**t, f"base_model.model.{n}.weight": torch.ones(70, 32)})
        (verdict,) = diagnose(folder, engines=["peft"]).verdicts
        assert any(
            f"{name}.weight has 70 rows, the base 64: the vocabulary was resized" in f.what for f in verdict.findings
        )
        edit_tensors(folder, lambda t: {k: v for k, v in t.items() if "lora_" in k})


def test_a_base_that_transformers_does_not_know(adapter, llama: Path, tmp_path: Path):
    """The headers of its weights say the same."""
    strange = shutil.copytree(llama, tmp_path / "strange")
    config = json.loads((llama / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps({**config, "model_type": "strange", "architectures": ["Strange"]}))
    folder = adapter()
    assert problems(diagnose(folder, base=strange)) == ""
    (strange / "model.safetensors").unlink()
    assert "not compared with the base" in notes(diagnose(folder, base=strange))
    (strange / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"its config.json cannot be read .* give --base FOLDER"):
        diagnose(folder, base=strange)
    edit_config(folder, base_model_name_or_path=str(strange))  # named by the adapter, it is only worth a note
    assert "its config.json cannot be read" in notes(diagnose(folder))


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_weights(adapter, keep: int):
    folder = adapter()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    found = diagnose(folder)
    assert "the weights cannot be read" in problems(found)
    assert {v.status for v in found.verdicts if v.engine.key not in ("mlx", "diffusers")} == {"refused"}


def test_a_git_lfs_pointer(adapter):
    folder = adapter()
    (folder / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in problems(diagnose(folder))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"r": 8,}', "[" * 100_000, "\ufeff{}"])
def test_a_config_that_is_no_config(adapter, text: str):
    folder = adapter()
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    assert "not valid JSON" in problems(diagnose(folder))


def test_a_file_that_is_absent(adapter):
    folder = adapter()
    (folder / "adapter_config.json").rename(folder / "x.json")
    assert "there is no adapter_config.json" in problems(diagnose(folder))
    (folder / "x.json").rename(folder / "adapter_config.json")
    (folder / "adapter_model.safetensors").unlink()
    assert "there are no weights" in problems(diagnose(folder))


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_never_opened(adapter, tmp_path: Path):
    folder = adapter(r=1, lora_alpha=1, alpha_pattern={"q_proj": 16}, rank_pattern={"q_proj": 16})
    (folder / "adapter_model.safetensors").unlink()
    payload = pickle.dumps(Bomb(tmp_path / "boom"))
    for path in (folder, folder / "adapter_model.bin", folder / "lora.pt"):
        (folder / "adapter_model.bin").write_bytes(payload)
        (folder / "lora.pt").write_bytes(payload)
        found = diagnose(path)
        assert "a pickle" in problems(found)
        assert not (tmp_path / "boom").exists()
    statuses = {v.engine.key: v.status for v in found.verdicts}
    assert statuses["vllm"] == "not checked"
    assert statuses["llama.cpp"] == "loads but mis-scaled"  # the config alone says so
    pickle.loads(payload)
    assert (tmp_path / "boom").exists()  # the bomb is live


def test_paths_that_are_no_adapter(tmp_path: Path, llama: Path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        diagnose(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty folder"):
        diagnose(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"not an adapter.*whole model"):
        diagnose(llama)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="is not an adapter"):
        diagnose(tmp_path / "notes.txt")


def test_a_runs_folder_has_it_in_adapter(adapter):
    folder = adapter()
    assert sound(diagnose(folder.parent))
    assert sound(diagnose(folder / "adapter_config.json"))
    assert sound(diagnose(folder / "adapter_model.safetensors"))


def test_shards_of_zero3_that_were_not_gathered(adapter):
    folder = adapter()
    edit_tensors(folder, lambda t: {k: torch.empty(0) for k in t})
    found = diagnose(folder)
    assert len(found.problems) == 1
    assert "12 of 12 tensors are empty (shape [0])" in problems(found)
    assert "gather the weights before saving" in found.problems[0].fix
    assert "trained" not in problems(found)


def test_keys_without_the_prefix(adapter):
    folder = adapter()
    edit_tensors(folder, lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()})
    found = diagnose(folder)
    assert "keys lack the prefix base_model.model." in problems(found)
    assert "do not belong" not in problems(found)
    verdicts = {v.engine.key: v for v in found.verdicts}
    assert {verdicts[key].status for key in ("vllm", "llama.cpp")} == {Status.LOADS}
    assert verdicts["peft"].status is Status.IN_PART
    assert not any("must end in" in f.what for v in found.verdicts for f in v.findings)
