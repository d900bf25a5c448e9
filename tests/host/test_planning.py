"""What is refused before a model is touched."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, T5Config, T5ForConditionalGeneration

from rankfold import PlainLoraConfig, RasaConfig
from rankfold.errors import RankfoldError
from rankfold.host.checkpoint import plain_name
from rankfold.host.layer import AdaptedLayer

TINY = T5Config(vocab_size=30, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2)
COMMON: dict[str, Any] = {"r": 2, "target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}


@pytest.mark.parametrize("fields", [{"modules_to_save": ["shared"]}, {"trainable_token_indices": [0, 1]}], ids=str)
def test_a_module_whose_name_ends_the_shared_state_s(fields: dict[str, Any]) -> None:
    """PEFT matches the end of a name, and would have wrapped the pool: an AttributeError, or a copy of it that nothing reads."""
    model = T5ForConditionalGeneration(TINY)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(RankfoldError, match="is about 'shared', with which 'lowrank_shared' ends"):
        get_peft_model(model, RasaConfig(shared_rank=1, **fields, **COMMON))
    assert [name for name, _ in model.named_modules()] == before
    get_peft_model(model, PlainLoraConfig(**fields, **COMMON))


def test_layers_of_all_linear() -> None:
    """As LoraConfig, which raises ValueError too: all of them would be adapted."""
    with pytest.raises(
        ValueError, match=r"layers_to_transform=.*None when target_modules is a string; list the modules"
    ):
        PlainLoraConfig(target_modules="all-linear", layers_to_transform=[1])


@pytest.mark.parametrize(
    "fields",
    [{"target_modules": "*.q"}, {"exclude_modules": "*encoder*"}, {"rank_pattern": {"*.q": 2}}, {"alpha_pattern": {"(q": 2}}],
    ids=str,
)  # fmt: skip
def test_patterns_as_shells_have_them(fields: dict[str, Any]) -> None:
    """PEFT takes them for regular expressions, and ended with a bare re.error once it was in the model."""
    (field,) = fields
    with pytest.raises(
        RankfoldError, match=rf"^RasaConfig: {field}: '[*(].*not a valid regular expression: .*write \.\* and not"
    ):
        RasaConfig(shared_rank=1, **{**COMMON, **fields})


def test_all_linear_layers_of_a_compiled_model() -> None:
    """The same as of the model itself: its head stays as it is, and names are those without torch.compile's."""
    plain, compiled = T5ForConditionalGeneration(TINY), torch.compile(T5ForConditionalGeneration(TINY), backend="eager")
    fields = {**COMMON, "target_modules": "all-linear"}
    one, other = (get_peft_model(m, RasaConfig(shared_rank=1, **fields)) for m in (plain, compiled))  # type: ignore[arg-type]
    names = [{plain_name(n) for n, m in model.named_modules() if isinstance(m, AdaptedLayer)} for model in (one, other)]
    assert names[0] == names[1]
    assert not any("lm_head" in name for name in names[0])
    assert one.get_nb_trainable_parameters() == other.get_nb_trainable_parameters()


@pytest.mark.parametrize("left_out", [["experts"], ".*mlp[.]experts", ["experts.down_proj"]])
def test_experts_that_are_left_out(left_out: Any) -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = Qwen3MoeConfig(**sizes, **heads, moe_intermediate_size=8, num_experts=2, num_experts_per_tok=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of fused experts
        fields = PlainLoraConfig(r=2, target_modules="all-linear", exclude_modules=left_out)
        model = get_peft_model(Qwen3MoeForCausalLM(config), fields)
    adapted = {n for n, p in model.named_parameters() if p.requires_grad and "experts" in n}
    assert not any("down_proj" in name for name in adapted)
    assert bool(adapted) == (left_out == ["experts.down_proj"])
