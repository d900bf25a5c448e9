"""Promise 9 for every method: wrong input gets one clear error that names the field, and the model is left as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import GPT2, LLAMA, MLP, TIED, Arch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from table import (
    FIRST,
    LIVE,
    ROWS,
    TABLE,
    Facts,
    Row,
    adapt,
    assert_same,
    first_rows,
    layers,
    rows,
    second,
    snapshot,
    spread,
)

BAD: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "r=0"),
    ({"r": -1}, "r=-1"),
    ({"r": 4.0}, "r=4.0"),
    ({"r": "8"}, "r='8'"),
    ({"r": True}, "r=True"),
    ({"r": None}, "r=None"),
    ({"lora_alpha": 0}, "lora_alpha=0"),
    ({"lora_alpha": "16"}, "lora_alpha='16'"),
    ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
    ({"lora_alpha": float("inf")}, "lora_alpha=inf"),
    ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
    ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
    ({"lora_dropout": "0.1"}, "lora_dropout='0.1'"),
    ({"bias": "all"}, "bias='all'"),
    ({"bias": "lora_only"}, "bias='lora_only'"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj']=0"),
    ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern['q_proj']=2.5"),
    ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern['q_proj']=-1"),
    ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform=[0]"),
    ({"layers_pattern": "h"}, "layers_pattern='h'"),
]


@pytest.mark.parametrize(
    ("facts", "kwargs", "named"),
    [(facts, kwargs, named) for facts in TABLE for kwargs, named in [*BAD, *facts.bad]],
    ids=lambda v: v.method if isinstance(v, Facts) else "-".join(map(str, v.items())) if isinstance(v, dict) else "",
)
def test_bad_config(facts: Facts, kwargs: dict[str, Any], named: str) -> None:
    row = Row(facts, "bad", {})
    with pytest.raises(ValueError, match=r"must be|exceeds") as caught:
        row.config(LLAMA, **kwargs)
    assert named in str(caught.value)
    assert f"{type(row.config(LLAMA)).__name__}: " in str(caught.value)


BAD_ON_A_MODEL: dict[str, tuple[Arch, dict[str, Any], type[Exception], str]] = {
    "no such name": (LLAMA, {"target_modules": ["nowhere"]}, ValueError, "nowhere.*not found in the base model"),
    "no such pattern": (LLAMA, {"target_modules": r"no\.such"}, ValueError, "not found in the base model"),
    "empty": (LLAMA, {"target_modules": []}, ValueError, "target_modules"),
    "excluded": (LLAMA, {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, ValueError, "exclude_modules"),
    "layer": (LLAMA, {"target_modules": ["q_proj"], "layers_to_transform": [9]}, ValueError, "layers_to_transform.*9"),
    "norm": (LLAMA, {"target_modules": ["q_proj", "norm"]}, TypeError, "target_modules: model.norm is a LlamaRMSNorm"),
    "attention": (
        LLAMA,
        {"target_modules": ["self_attn"]},
        TypeError,
        "self_attn is a LlamaAttention, and only linear",
    ),
    "norm of an MLP": (MLP, {"target_modules": ["norm"]}, TypeError, "target_modules: norm is a LayerNorm"),
    "list of blocks": (MLP, {"target_modules": "blocks"}, TypeError, "target_modules: blocks is a ModuleList"),
}


@spread(FIRST, wrong=BAD_ON_A_MODEL, fresh=[True, False])
def test_bad_config_for_this_model(row: Row, wrong: str, fresh: bool) -> None:
    """As the first adapter, and as one more beside a good one."""
    arch, changes, error, named = BAD_ON_A_MODEL[wrong]
    if fresh:
        model = arch.build()
        before, types = snapshot(model), {n: type(m) for n, m in model.named_modules()}
        flags = {n: p.requires_grad for n, p in model.named_parameters()}
        with pytest.raises(error, match=named):
            get_peft_model(model, row.config(arch, **changes))  # pyright: ignore[reportArgumentType]
        assert {n: type(m) for n, m in model.named_modules()} == types
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    else:
        model = adapt(arch, row)
        before, wanted = snapshot(model), arch.out(model)
        with pytest.raises(error, match=named):
            model.add_adapter("bad", row.config(arch, **changes))
        assert list(model.peft_config) == ["default"]
        assert torch.equal(arch.out(model), wanted)
        second(model, arch, row, "bad")  # the name is not burnt
        model.delete_adapter("bad")
    assert_same(snapshot(model), before)


@first_rows
def test_targeting_a_tied_head_is_not_silent(row: Row) -> None:
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        adapt(TIED, row, target_modules=["lm_head"])


@first_rows
def test_pattern_that_matches_nothing_is_not_silent(row: Row) -> None:
    with pytest.warns(RuntimeWarning, match=r"rank_pattern keys did not match.*nowhere"):
        adapt(LLAMA, row, rank_pattern={"nowhere": 2})


def test_shapes_that_cannot_share() -> None:
    """The one reason two layers of a kind cannot: ranks that differ. (Other shapes make another group.)"""
    row = next(row for row in ROWS if str(row) == "rasa-k1")
    model = LLAMA.build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"rank_pattern gives .*q_proj.* the ranks \[3, 4\].*give the whole"):
        get_peft_model(model, row.config(LLAMA, rank_pattern={"layers.1.self_attn.q_proj": 3}))  # pyright: ignore[reportArgumentType]
    assert_same(snapshot(model), before)


# Checkpoints --------------------------------------------------------------------------------------------------------


def _drop(state: dict) -> None:
    del state[min(state)]


def _foreign(state: dict) -> None:
    state["base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"] = torch.zeros(2, 2)


def _foreign_ours(state: dict) -> None:
    key = next(k for k in state if "lowrank_adapters" in k)
    state[key.replace("layers.0", "layers.7")] = state[key].clone()


def _nan(state: dict) -> None:
    state[max(_with_values(state))].view(-1)[0] = float("nan")


def _inf(state: dict) -> None:
    state[min(_with_values(state))].view(-1)[-1] = float("inf")


def _with_values(state: dict) -> list[str]:
    """Keys of the tensors that are not indices."""
    return [k for k, t in state.items() if t.is_floating_point()]


def _reshape(state: dict) -> None:
    key = next(k for k in state if state[k].ndim == 2)
    state[key] = torch.zeros(state[key].shape[0] + 1, state[key].shape[1])


def _empty(state: dict) -> None:
    state.clear()


BROKEN: dict[str, tuple[Callable[[dict], None], str]] = {
    "missing": (_drop, r"lacks 1 of \d+ tensors \(such as .*Check base_model_name_or_path"),
    "empty": (_empty, r"lacks (\d+) of \1 tensors"),
    "foreign": (_foreign, r"has 1 that do not belong \(such as .*k_proj.lora_A"),
    "foreign-layer": (_foreign_ours, r"has 1 that do not belong \(such as .*layers.7"),
    "nan": (_nan, "NaN or infinity in .*diverged"),
    "inf": (_inf, "NaN or infinity in .*diverged"),
    "shape": (_reshape, r"of shape .* but this model and config need .*another base model, rank"),
}


@spread([*ROWS, *LIVE], kind=BROKEN)
def test_broken_checkpoint(row: Row, kind: str, tmp_path: Path) -> None:
    """Into an adapter that is there: nothing changes. Into a new one: what was there does not change."""
    breaker, named = BROKEN[kind]
    adapt(LLAMA, row).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = {k: v.clone() for k, v in load_file(file).items()}
    breaker(state)
    save_file(state, file)

    model = adapt(LLAMA, row, seed=5)
    before, wanted = snapshot(model), LLAMA.out(model)
    with pytest.raises(ValueError, match=named) as caught:
        set_peft_model_state_dict(model, state)
    assert row.facts.method in str(caught.value)
    assert_same(snapshot(model), before)
    with pytest.raises(ValueError, match=named):
        model.load_adapter(tmp_path, "new")
    assert torch.equal(LLAMA.out(model), wanted)
    assert_same(snapshot(model), before)

    base = LLAMA.build()
    plain = LLAMA.out(base)
    with pytest.raises(ValueError, match=named):
        PeftModel.from_pretrained(base, tmp_path)
    if row.facts.starts_at_base:
        torch.testing.assert_close(LLAMA.out(base), plain, rtol=1e-6, atol=1e-6)


@rows
@pytest.mark.filterwarnings("ignore:target_modules. .* has no effect. no module of the model is called")
def test_checkpoint_of_another_rank_or_base(row: Row, tmp_path: Path) -> None:
    source = adapt(LLAMA, row)
    state = get_peft_model_state_dict(source)
    other_rank = adapt(LLAMA, row, r=6, rank_pattern={})
    before = snapshot(other_rank)
    with pytest.raises(ValueError, match=r"of shape .* but this model and config need|lacks .* of .* tensors"):
        set_peft_model_state_dict(other_rank, state)
    assert_same(snapshot(other_rank), before)

    source.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": row.rank(7), "rank_pattern": {}}))
    with pytest.raises(ValueError, match=rf"{row.facts.method} adapter .*(rank|config)"):
        PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not found in the base model"):
        PeftModel.from_pretrained(GPT2.build(), tmp_path)


@spread(FIRST, size=[0, 5, 200, -4])  # nothing, no header, in the header, in the data
def test_truncated_file(row: Row, size: int, tmp_path: Path) -> None:
    """safetensors' own error, since PEFT reads the file before it asks a method; the model stays as it was."""
    model = adapt(LLAMA, row)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    before = snapshot(model)
    with pytest.raises((SafetensorError, OSError)):
        model.load_adapter(tmp_path, "new")
    model.delete_adapter("new")
    assert_same(snapshot(model), before)


@first_rows
def test_file_of_another_method(row: Row, tmp_path: Path) -> None:
    """Refused wherever the tensors can tell."""

    def shapes(state: dict) -> dict:
        return {k: tuple(t.shape) for k, t in state.items()}

    adapt(LLAMA, row).save_pretrained(tmp_path)
    found = shapes(load_file(tmp_path / "adapter_model.safetensors"))
    for other in FIRST:
        if shapes(get_peft_model_state_dict(adapt(LLAMA, other))) != found:
            config = other.config(LLAMA)
            config.save_pretrained(tmp_path)
            with pytest.raises(ValueError, match=f"checkpoint of this {config.method} adapter"):
                PeftModel.from_pretrained(LLAMA.build(), tmp_path)


@first_rows
def test_calls_that_make_no_sense(row: Row) -> None:
    model = adapt(LLAMA, row)
    before = snapshot(model)
    with pytest.raises(ValueError, match="not found"):
        model.set_adapter("gone")
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("gone")
    with pytest.raises(TypeError, match="list of strings"):
        model.merge_adapter("default")
    model.merge_adapter(["gone"])  # as in PEFT: nothing to do
    assert not any(layer.merged for layer in layers(model).values())
    assert_same(snapshot(model), before)
