"""Small mixtures of experts, built from their configs with random weights; knows nothing of rankfold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from models import VOCAB, Arch
from torch import Tensor, nn

_SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
    "intermediate_size": 24,
}
_LOCAL, _EXPERTS = {"num_local_experts": 4, "intermediate_size": 12}, {"num_experts": 4, "moe_intermediate_size": 12}
_DEEPSEEK = {
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}


def _made(model: str, **sizes: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(hf, f"{model}ForCausalLM")(getattr(hf, f"{model}Config")(**{**_SMALL, **sizes}))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "mixtral": _made("Mixtral", **_LOCAL),
    "qwen2_moe": _made("Qwen2Moe", **_EXPERTS, shared_expert_intermediate_size=20),
    "qwen3_moe": _made("Qwen3Moe", **_EXPERTS, head_dim=8),
    "olmoe": _made("Olmoe", num_experts=4, intermediate_size=12),
    "deepseek_v3": _made("DeepseekV3", **_DEEPSEEK),
    "gpt_oss": _made("GptOss", **_LOCAL, head_dim=8, layer_types=["full_attention", "full_attention"]),
    "granitemoe": _made("GraniteMoe", **_LOCAL),
}
IDS = torch.arange(3, 27).view(2, 12)


def build(family: str) -> nn.Module:
    """The same weights every time, without touching the caller's generator."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = FAMILIES[family]().eval()
        with torch.no_grad():  # the usual 0.02 would let the experts' work vanish in the residual stream
            for p in model.parameters():
                if p.ndim > 1:
                    p.normal_(0, 0.2)
        return model


@torch.no_grad()
def out(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(ids).logits


MOE = Arch("qwen3_moe", lambda: build("qwen3_moe"), ("q_proj", "o_proj"), "CAUSAL_LM")
