"""Tests that what no adapter reaches is named: peft#3009 and unsloth#11014, where experts were left out without a word."""

from __future__ import annotations

import logging

import pytest
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

from rankfold import PlainLoraConfig
from rankfold.host import unreached
from rankfold.host.unreached import EXPERTS, in_words

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}


def moe(**more) -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=4, **more))


def found(model: nn.Module, **fields) -> dict[str, unreached.Unreached]:
    return {one.kind: one for one in unreached.unreached(get_peft_model(model, PlainLoraConfig(r=2, **fields)))}  # pyright: ignore


def test_experts_and_embeddings_by_their_share():
    model = moe()
    total = model.num_parameters()
    left = found(model, target_modules=["q_proj"])
    assert list(left) == [EXPERTS, "embeddings"]
    assert left[EXPERTS].parameters == 2 * 4 * 3 * 16 * 24
    assert left[EXPERTS].share == left[EXPERTS].parameters / total
    assert left[EXPERTS].names[0] == "model.layers.0.mlp.experts.gate_up_proj"
    assert in_words([left["embeddings"]]).endswith(
        f"{100 * 640 / total:.3g} % of the parameters (model.embed_tokens.weight)"
    )


def test_a_tied_head_is_named_with_its_embedding_and_counted_once():
    left = found(moe(tie_word_embeddings=True), target_modules=["q_proj"])
    assert left["embeddings"].names == ("model.embed_tokens.weight", "lm_head.weight")
    assert left["embeddings"].parameters == 640


def test_what_is_trained_in_full_is_reached():
    left = found(moe(), target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    assert list(left) == [EXPERTS]


def test_convolutions_are_named_and_position_tables_are_no_experts():
    config = hf.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    (left,) = found(hf.ViTModel(config), target_modules=["q_proj"]).values()
    assert (left.kind, left.parameters) == ("convolutions", 3 * 16 * 16 + 16)


def test_all_linear_says_it_once(caplog: pytest.LogCaptureFixture):
    unreached._log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "rankfold"):
        for _ in range(2):
            base = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))
            get_peft_model(base, PlainLoraConfig(r=2, target_modules="all-linear"))
    (said,) = caplog.messages
    assert said.startswith("target_modules='all-linear': no adapter on: embeddings, ")


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's, of what its own conversion targets
def test_pefts_adapters_of_parameters_count_as_reached():
    model = get_peft_model(moe(), LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"]))
    left = {one.kind: one for one in unreached.unreached(model)}
    assert left[EXPERTS].parameters == 2 * 4 * 2 * 16 * 24  # gate_up_proj alone


def test_linear_layers_whose_name_means_the_experts_are_named():
    sizes = {
        **SIZES,
        "moe_intermediate_size": 12,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": 2,
    }
    ranks = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    model = hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**sizes, **ranks, n_shared_experts=1, first_k_dense_replace=1))
    left = found(model, target_modules=["gate_proj", "up_proj", "down_proj"])
    assert left["linear layers called as experts were"].names[0] == "model.layers.0.mlp.gate_proj.weight"
    assert left["linear layers called as experts were"].parameters == 3 * 16 * 24 + 3 * 16 * 12
    assert EXPERTS not in left
