"""What a name in target_modules is told that the model does not have: the modules that do its work here, and all that can be adapted."""

from __future__ import annotations

import pytest
from models import BERT, GPT2, LLAMA, T5, VIT, Arch
from moe_models import build
from peft import LoraConfig, get_peft_model

from rankfold import PlainLoraConfig
from rankfold.errors import RankfoldError
from rankfold.host.names import absent_in_words
from rankfold.host.targets import absent_names
from rankfold.plan.cost import cost

#: A name that the architecture does not have, and those that the sentence must offer.
WRONG: list[tuple[Arch, str, list[str]]] = [
    (BERT, "q_proj", ["query"]),
    (BERT, "v_proj", ["value"]),
    (BERT, "up_proj", ["intermediate.dense"]),
    (BERT, "o_proj", ["attention.output.dense"]),
    (BERT, "c_attn", ["query", "key", "value"]),
    (LLAMA, "c_attn", ["q_proj", "k_proj", "v_proj"]),
    (LLAMA, "query_key_value", ["q_proj", "k_proj", "v_proj"]),
    (LLAMA, "query", ["q_proj"]),
    (LLAMA, "fc1", ["gate_proj", "up_proj"]),
    (GPT2, "q_proj", ["c_attn"]),
    (GPT2, "fc_in", ["c_fc"]),
    (T5, "q_proj", ["q"]),
    (VIT, "query", ["q_proj"]),
    (VIT, "qkv", ["q_proj", "k_proj", "v_proj"]),
]


@pytest.mark.parametrize(("arch", "name", "offered"), WRONG, ids=lambda value: str(getattr(value, "name", value)))
def test_a_name_of_another_model(arch: Arch, name: str, offered: list[str]) -> None:
    model, config = arch.build(), LoraConfig(target_modules=[name])
    assert absent_names(config, model) == [("target_modules", name)]
    said = absent_in_words("target_modules", name, model)
    assert f"is called {name!r}" in said
    assert f"its place here is {' and '.join(map(repr, offered))};" in said
    for own in offered:  # what is offered works
        assert not absent_names(LoraConfig(target_modules=[own]), model)
    listed = said.partition("linear layers: ")[2].split(", ")
    assert set(arch.targets) <= set(listed)
    assert len(said) < 500


def test_a_name_like_another_and_one_like_none() -> None:
    assert "'self_attn.qproj'; did you mean 'q_proj'? linear" in absent_in_words(
        "target_modules", "self_attn.qproj", LLAMA.build()
    )
    said = absent_in_words("target_modules", "frobnicate", LLAMA.build())
    assert "did you mean" not in said
    assert "its place here" not in said
    assert said.endswith("linear layers: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head")


def test_experts_are_listed_by_the_names_that_serve() -> None:
    said = absent_in_words("target_modules", "fc2", build("qwen3_moe"))
    assert "its place here is 'down_proj';" in said
    said = absent_in_words("target_parameters", "experts.gate_up", build("qwen3_moe"))
    assert "no parameter of the model is called 'experts.gate_up'" in said
    assert "experts.gate_up_proj" in said


def test_where_it_is_said() -> None:
    with pytest.raises(RankfoldError, match=r"target_modules: .* 'query'; its place here is 'q_proj'"):
        cost(LLAMA.build(), PlainLoraConfig(target_modules=["query"]))
    with pytest.warns(UserWarning, match=r"'query' has no effect: .* its place here is 'q_proj'"):
        get_peft_model(LLAMA.build(), PlainLoraConfig(target_modules=["query", "v_proj"]))  # pyright: ignore
    for names in (["query", "value"], r".*\.(query|value)"):
        with pytest.raises(ValueError, match=r"linear layers: q_proj, k_proj, v_proj, o_proj"):
            get_peft_model(LLAMA.build(), PlainLoraConfig(target_modules=names))  # pyright: ignore
