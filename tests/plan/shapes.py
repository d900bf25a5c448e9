"""Folders with a config.json and nothing else, and the same models with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn

_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_TOKENS = {"vocab_size": 40, "pad_token_id": 0}

CONFIGS: dict[str, tuple[type, Any]] = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**_SMALL, **_TOKENS, num_key_value_heads=1, bos_token_id=1, eos_token_id=2)),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, **_TOKENS, bos_token_id=1, eos_token_id=2)),
    "bert": (hf.BertForSequenceClassification, hf.BertConfig(**_SMALL, **_TOKENS)),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, **_TOKENS)),
    "vit": (hf.ViTForImageClassification, hf.ViTConfig(**_SMALL, image_size=8, patch_size=4)),
}  # fmt: skip

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": False,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip


def folder(at: Path, name: str, **more: Any) -> Path:
    """A folder with the config alone."""
    made, config = CONFIGS[name]
    at.mkdir(parents=True, exist_ok=True)
    values = {**config.to_dict(), "architectures": [made.__name__], **more}
    (at / "config.json").write_text(json.dumps(values))
    return at


def real(name: str) -> nn.Module:
    made, config = CONFIGS[name]
    torch.manual_seed(0)
    return made(config)
