"""What each engine makes of which adapter, with the numbers of a wrong scale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from edits import edit_config, edit_tensors, sound
from peft import LoKrConfig, get_peft_model, save_as_lora
from transformers import LlamaForCausalLM

from rankfold import PlainLoraConfig, RasaConfig
from rankfold.doctor import Diagnosis, Status, diagnose
from rankfold.doctor.engine_rules import tgi_padded
from rankfold.doctor.engines import ENGINES
from rankfold.fold import fold_adapter

PEFT_READERS = ("vllm", "vllm-old", "sglang", "llama.cpp", "ollama", "tgi", "peft")
LOADS, REFUSED, MIS, PART = Status.LOADS, Status.REFUSED, Status.MIS_SCALED, Status.IN_PART
UNCHECKED = Status.NOT_CHECKED


def verdicts(found: Diagnosis) -> dict[str, Status]:
    return {v.engine.key: v.status for v in found.verdicts}


def why(found: Diagnosis, engine: str) -> str:
    verdict = next(v for v in found.verdicts if v.engine.key == engine)
    return " | ".join(f"{f.what} [{f.where}] {f.fix}" for f in verdict.findings)


def expect(found: Diagnosis, **other: Status) -> None:
    """Everything that reads PEFT's format loads it but Ollama, or as said (`vllm_old` for "vllm-old", `llama` for "llama.cpp")."""
    names = {"vllm_old": "vllm-old", "llama": "llama.cpp"}
    wanted = (
        dict.fromkeys(PEFT_READERS, LOADS) | {"ollama": Status.WRONG} | {names.get(k, k): v for k, v in other.items()}
    )
    assert {k: v for k, v in verdicts(found).items() if k in PEFT_READERS} == wanted


def test_a_plain_lora_loads_everywhere(adapter):
    found = diagnose(adapter())
    expect(found)
    assert verdicts(found)["mlx"] is verdicts(found)["diffusers"] is Status.DOES_NOT_APPLY
    assert found.findings == []
    assert sound(found)


@pytest.mark.parametrize("config", [RasaConfig(r=4, shared_rank=1), PlainLoraConfig(r=3, rank_pattern={"q_proj": 5})])
def test_a_fold_of_ours_loads_everywhere_and_the_unfolded_nowhere(config, llama: Path, tmp_path: Path):
    config.target_modules, config.task_type, config.init_lora_weights = ["q_proj", "down_proj"], "CAUSAL_LM", False
    get_peft_model(LlamaForCausalLM.from_pretrained(llama), config).save_pretrained(tmp_path / "adapter")
    found = diagnose(tmp_path / "adapter")
    expect(found, **dict.fromkeys(("vllm", "vllm_old", "sglang", "llama", "ollama", "peft"), REFUSED), tgi=PART)
    assert found.problems == []
    assert "import rankfold first" in why(found, "peft")
    assert f"rankfold fold {tmp_path / 'adapter'} -o OUT" in why(found, "vllm")
    assert not found.healthy

    fold_adapter(tmp_path / "adapter", tmp_path / "folded", base=str(llama), probe=False)
    found = diagnose(tmp_path / "folded")
    expect(found)
    assert found.findings == []
    assert sound(found)


def test_rslora_is_ignored_by_sglang_and_gguf(adapter):
    found = diagnose(adapter(r=16, use_rslora=True))
    expect(found, sglang=MIS, llama=MIS)
    assert "scale 1 where 4 is right, 4 times too small" in why(found, "sglang")
    assert "(6 of 6 modules)" in why(found, "sglang")
    assert "(use_rslora)]" in why(found, "sglang")


def test_the_scale_of_save_as_lora(adapter):
    """lora_alpha 1 with patterns gives 1/16 and 1/13 in llama.cpp."""
    patterns = {"q_proj": 16, "v_proj": 13}
    found = diagnose(adapter(r=1, lora_alpha=1, rank_pattern=patterns, alpha_pattern=patterns))
    expect(found, sglang=REFUSED, llama=MIS, tgi=MIS)
    assert "scale 0.0625 where 1 is right, 16 times too small, in model.layers.0.self_attn.q_proj" in why(
        found, "llama.cpp"
    )
    text = (found.path / "adapter_config.json").read_text()
    line = text[: text.index("alpha_pattern")].count("\n") + 1
    assert f"adapter_config.json:{line} (alpha_pattern)" in why(found, "llama.cpp")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_peft_really_saves(llama: Path, tmp_path: Path):
    lokr = LoKrConfig(r=4, target_modules=["q_proj"], init_weights=False, task_type="CAUSAL_LM")
    save_as_lora(tmp_path, get_peft_model(LlamaForCausalLM.from_pretrained(llama), lokr), rank=0.9)
    found = diagnose(tmp_path)
    assert (verdicts(found)["vllm"], verdicts(found)["llama.cpp"]) == (LOADS, MIS)
    assert "where 1 is right" in why(found, "llama.cpp")


def test_a_rank_pattern_without_alphas(adapter):
    """Right where α is divided by each tensor's rank, wrong where one scale serves all."""
    found = diagnose(adapter(r=8, lora_alpha=8, rank_pattern={"v_proj": 16}))
    expect(found, vllm_old=MIS, sglang=REFUSED, tgi=MIS)
    assert "scale 1 where 0.5 is right, 2 times too large" in why(found, "vllm-old")
    assert "(3 of 6 modules)" in why(found, "vllm-old")
    assert "(rank_pattern)" in why(found, "vllm-old")


def test_ranks_that_differ_within_a_type_cannot_be_stacked(adapter):
    found = diagnose(adapter(r=8, lora_alpha=8, rank_pattern={"1.self_attn.v_proj": 16}))
    assert verdicts(found)["tgi"] is REFUSED
    assert "ranks of v_proj differ (8 to 16)" in why(found, "tgi")


def test_dora(adapter):
    found = diagnose(adapter(use_dora=True))
    expect(found, vllm=REFUSED, vllm_old=REFUSED, sglang=REFUSED, llama=REFUSED, ollama=REFUSED, tgi=PART)
    assert "(use_dora)" in why(found, "vllm")
    assert "lora_magnitude_vector" in why(found, "llama.cpp")


def test_pissa_in_the_config_is_refused_by_vllm(adapter):
    folder = adapter()
    edit_config(folder, init_lora_weights="pissa")
    found = diagnose(folder)
    wrong = dict.fromkeys(("vllm_old", "sglang", "llama", "tgi"), Status.WRONG)
    expect(found, vllm=REFUSED, **wrong)
    assert "init_lora_weights='pissa'" in why(found, "vllm")
    edit_config(folder, init_lora_weights="gaussian")
    expect(diagnose(folder))


def test_modules_to_save_and_bias(adapter):
    found = diagnose(adapter(modules_to_save=["lm_head"]))
    expect(found, vllm=REFUSED, vllm_old=REFUSED, sglang=PART, llama=REFUSED, ollama=REFUSED, tgi=PART)
    assert "modules_to_save=['lm_head']" in why(found, "vllm")
    assert found.problems == []

    folder = adapter()
    edit_config(folder, bias="all")
    expect(diagnose(folder), vllm=REFUSED, vllm_old=REFUSED)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_embeddings_and_the_head(adapter, llama: Path):
    found = diagnose(adapter(target_modules=["q_proj", "embed_tokens"]))
    assert verdicts(found)["vllm"] is UNCHECKED
    assert verdicts(found)["vllm-old"] is REFUSED
    assert "base_layer.weight" in why(found, "vllm-old")
    found = diagnose(adapter(target_modules=["q_proj", "lm_head"]))
    assert verdicts(found)["llama.cpp"] is LOADS  # this base does not tie it
    assert verdicts(found)["vllm"] is LOADS  # it skips the whole head that PEFT saved with it
    config = json.loads((llama / "config.json").read_text())
    tied = found.path.parent / "tied"
    tied.mkdir()
    (tied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert "ties it" in why(diagnose(found.path, base=tied), "llama.cpp")


def test_layers_that_are_absent_drop_the_type_in_tgi(adapter):
    found = diagnose(adapter(layers_to_transform=[0, 2]))
    expect(found, tgi=PART)
    assert "q_proj has no tensors in layer 1 (1 of 3 absent)" in why(found, "tgi")


def test_the_last_layers_absence_needs_the_base(adapter):
    folder = adapter(layers_to_transform=[0, 1])
    assert verdicts(diagnose(folder))["tgi"] is PART
    edit_config(folder, base_model_name_or_path="someone/gone")
    assert verdicts(diagnose(folder))["tgi"] is LOADS


def test_tgi_divides_the_later_types_by_the_padded_rank(adapter):
    found = diagnose(adapter(r=4, lora_alpha=4))
    expect(found, tgi=MIS)
    assert "scale 0.5 where 1 is right" in why(found, "tgi")
    assert "v_proj (3 of 6 modules)" in why(found, "tgi")
    assert [tgi_padded(r) for r in (1, 8, 9, 16, 17, 320)] == [8, 8, 16, 16, 32, 320]


def test_a_float_alpha_fails_in_ollama_alone(adapter):
    folder = adapter()
    edit_config(folder, lora_alpha=16.0)
    found = diagnose(folder)
    expect(found, ollama=REFUSED)
    assert found.healthy is False
    assert diagnose(folder, engines=["vllm", "llama.cpp"]).healthy


def test_regex_targets_fail_in_sglang(adapter):
    found = diagnose(adapter(target_modules=r".*\.(q|v)_proj"))
    expect(found, sglang=REFUSED)
    assert "must be a list" in why(found, "sglang")
    assert found.problems == []


@pytest.mark.parametrize(
    ("rank", "status", "flag"),
    [(16, LOADS, ""), (20, LOADS, "--max-lora-rank 32"), (520, REFUSED, "-o OUT --rank 512")],
)
def test_vllms_ranks(adapter, rank: int, status: Status, flag: str):
    found = diagnose(adapter(r=rank, target_modules=["q_proj"]), engines=["vllm"])
    assert verdicts(found) == {"vllm": status}
    assert flag in why(found, "vllm")


@pytest.mark.parametrize(
    ("key", "value"),
    [("layer_replication", [[0, 1]]), ("lora_bias", True), ("alora_invocation_tokens", [1]), ("use_qalora", True)],
)
def test_flags_that_vllm_refuses(adapter, key: str, value):
    folder = adapter()
    edit_config(folder, **{key: value})
    found = diagnose(folder)
    expect(found, **{**_others_than_vllm(key), "vllm": REFUSED})
    assert f"({key})" in why(found, "vllm")
    assert "not checked" not in why(found, "vllm")  # what is refused needs no check


def _others_than_vllm(key: str) -> dict[str, Status]:
    """Of lora_bias the tensors decide, and there are none here; the other keys were seen in none of these."""
    return {} if key == "lora_bias" else dict.fromkeys(("vllm_old", "sglang", "llama", "tgi"), UNCHECKED)


#: LoRA of PEFT's that is more than B·A of linear layers, and what the loaders of three engines do with it.
MORE_THAN_FACTORS = {
    "dora": ({"use_dora": True}, PART, REFUSED, REFUSED),
    "lora_bias": ({"lora_bias": True}, PART, REFUSED, REFUSED),
    "embeddings": ({"target_modules": ["q_proj", "v_proj", "embed_tokens"]}, PART, REFUSED, REFUSED),
    "tokens": ({"trainable_token_indices": [1, 2]}, PART, REFUSED, REFUSED),
    "norm": ({"modules_to_save": ["norm"]}, PART, REFUSED, REFUSED),
    "whole head": ({"modules_to_save": ["lm_head"]}, UNCHECKED, REFUSED, REFUSED),
    "head": ({"target_modules": ["q_proj", "v_proj", "lm_head"]}, LOADS, REFUSED, REFUSED),
    "ranks": ({"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 4}}, LOADS, UNCHECKED, REFUSED),
    "one string": ({"target_modules": r".*\.(q|v)_proj"}, LOADS, LOADS, REFUSED),
}


@pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`:UserWarning",
    "ignore:`lora_bias=True` was passed:UserWarning",
    "ignore:.*invalid shape.*lora_B.bias:peft.utils.warning.PeftWarning",  # a bias has one dimension
)
@pytest.mark.parametrize("name", MORE_THAN_FACTORS)
def test_what_is_more_than_factors_in_openvino_mistral_rs_and_lmdeploy(adapter, name: str):
    options, *wanted = MORE_THAN_FACTORS[name]
    found = verdicts(diagnose(adapter(**{"r": 8, "lora_alpha": 8, **options})))
    assert [found[key] for key in ("openvino", "mistral.rs", "lmdeploy")] == wanted


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_replication", [[0, 1]]),
        ("alora_invocation_tokens", [1]),
        ("use_qalora", True),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 1e-4}),
    ],
)
def test_no_engine_but_peft_is_said_to_load_a_key_that_was_not_seen_in_it(adapter, key: str, value):
    folder = adapter(r=8, lora_alpha=8)
    edit_config(folder, **{key: value})
    found = diagnose(folder)
    # PEFT's Arrow needs a router's own call to be made
    assert [k for k, status in verdicts(found).items() if status is LOADS] == ["peft"] * (key != "arrow_config")
    assert (verdicts(found)["mistral.rs"] is REFUSED) == (key != "kasa_config")
    edit_config(folder, **{key: None})
    assert verdicts(diagnose(folder))["sglang"] is LOADS


def test_dtypes_that_engines_were_not_seen_to_read(adapter):
    folder = adapter(r=8, lora_alpha=8)
    edit_tensors(folder, lambda t: {k: v.double() for k, v in t.items()})
    found = verdicts(diagnose(folder))
    assert (found["openvino"], found["vllm"], found["peft"]) == (REFUSED, LOADS, LOADS)
    edit_tensors(folder, lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()})
    found = verdicts(diagnose(folder))
    assert [key for key, status in found.items() if status is LOADS] == ["peft"]
    assert found["openvino"] is REFUSED


def test_keys_without_peft_s_prefix(adapter):
    folder = adapter(r=8, lora_alpha=8)
    edit_tensors(folder, lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()})
    found = verdicts(diagnose(folder))
    assert (found["openvino"], found["mistral.rs"], found["lmdeploy"]) == (PART, LOADS, REFUSED)


def test_convolutions_and_bases_that_are_not_language_models_are_not_checked(adapter, llama: Path, tmp_path: Path):
    folder = adapter(r=8, lora_alpha=8)
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    found = diagnose(folder, base=tmp_path)
    assert [k for k, status in verdicts(found).items() if status is LOADS] == ["peft"]
    assert "whether it serves a 'LlamaModel' was not checked" in why(found, "vllm")

    edit_tensors(folder, lambda t: {k: v[..., None, None] for k, v in t.items()})
    found = diagnose(folder, engines=["sglang", "llama.cpp", "tgi", "vllm-old", "peft"])
    assert set(verdicts(found).values()) == {UNCHECKED, LOADS}
    assert verdicts(found)["peft"] is LOADS


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_ollama_stops_at_a_lora_of_embeddings(adapter):
    found = diagnose(adapter(target_modules=["embed_tokens"]), engines=["ollama", "llama.cpp"])
    assert verdicts(found) == {"ollama": REFUSED, "llama.cpp": LOADS}


def test_keys_that_engines_need(adapter):
    folder = adapter()
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["lora_alpha"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = diagnose(folder)
    for engine in ("vllm", "sglang", "llama.cpp"):
        assert "the config has no lora_alpha" in why(found, engine)


def test_added_tokens_are_refused_by_sglang(adapter):
    folder = adapter()
    (folder / "added_tokens.json").write_text('{"<new>": 64}')
    expect(diagnose(folder), sglang=REFUSED)
    (folder / "added_tokens.json").write_text('{"<old>": 63}')
    expect(diagnose(folder))


def test_ollama_converts_two_architectures(adapter, llama: Path, tmp_path: Path):
    folder = adapter()
    other = tmp_path / "qwen"
    other.mkdir()
    config = json.loads((llama / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps({**config, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})
    )
    assert verdicts(diagnose(folder, base=other))["ollama"] is REFUSED
    edit_config(folder, base_model_name_or_path=None)
    found = diagnose(folder)
    assert verdicts(found)["ollama"] is UNCHECKED
    assert sound(found)  # what could not be checked is no failure ...
    assert not diagnose(folder, engines=["ollama"]).healthy  # ... unless it was asked for
    assert "needs --base" in why(found, "llama.cpp")


def test_norms_are_converted_and_not_applied(adapter):
    folder = adapter()
    name = "base_model.model.model.layers.0.input_layernorm.weight"
    edit_tensors(folder, lambda t: {**t, name: torch.ones(32)})
    assert verdicts(diagnose(folder))["llama.cpp"] is PART


def test_other_methods_of_peft_are_read_by_peft_alone(adapter):
    folder = adapter()
    edit_config(folder, peft_type="LOHA")
    found = diagnose(folder)
    expect(found, **dict.fromkeys(("vllm", "vllm_old", "sglang", "llama", "ollama"), REFUSED), tgi=PART)
    edit_config(folder, peft_type="NOPE")
    assert "unknown to PEFT" in why(diagnose(folder), "peft")


def test_every_engine_says_what_was_read():
    assert all(e.version and e.reads and e.rules for e in ENGINES)
    assert len({e.key for e in ENGINES}) == len(ENGINES) == 13
    assert {e.known for e in ENGINES} == {"run", "loader run", "source read"}
