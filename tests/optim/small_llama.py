"""A two-layer Llama with adapters of rankfold's or PEFT's, and a loop."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "v_proj", "down_proj"]
VOCAB = 32


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2
        )
    )  # fmt: skip


def adapted(config: PeftConfig | None = None, seed: int = 1, **kwargs: Any) -> Any:
    """With an adapter; LoRA of PEFT's at rank 4 unless another is given."""
    if config is None:
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **kwargs})
    model = llama()
    torch.manual_seed(seed)
    return get_peft_model(model, config)


def batch(seed: int, rows: int = 4) -> Tensor:
    return torch.randint(0, VOCAB, (rows, 8), generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        ids = batch(step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def trained(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every adapter parameter, frozen ones included."""
    return {
        n: p.detach().clone() for n, p in model.named_parameters() if "lora" in n or "lowrank" in n or p.requires_grad
    }
