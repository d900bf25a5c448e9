"""A random tiny Llama, and adapters of stock PEFT on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

TINY = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64,
)  # fmt: skip


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(TINY).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """Saves a LoRA of stock PEFT; keywords are LoraConfig's."""

    def make(**kwargs: Any) -> Path:
        defaults = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
        model = LlamaForCausalLM.from_pretrained(llama)
        get_peft_model(model, LoraConfig(**{**defaults, "task_type": "CAUSAL_LM", **kwargs})).save_pretrained(
            tmp_path / "adapter"
        )
        return tmp_path / "adapter"

    return make
