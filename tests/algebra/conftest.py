"""Two small bases of one type, and adapters on the first."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rankfold import PlainLoraConfig, RasaConfig, SoraConfig

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = {"rank_pattern": {"q_proj": 7, r".*1\.mlp\.down_proj": 9}, "alpha_pattern": {"k_proj": 3}}
OURS = {"task_type": "CAUSAL_LM", "target_modules": ALL, "init_lora_weights": False}
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "peft lora": lambda: LoraConfig(r=4, lora_alpha=6, target_modules=ALL, task_type="CAUSAL_LM"),
    "peft q, v": lambda: LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "peft q": lambda: LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "peft rslora, patterns": lambda: LoraConfig(
        r=4, use_rslora=True, target_modules=ALL, task_type="CAUSAL_LM", **PATTERNS
    ),
    "peft dora": lambda: LoraConfig(r=4, use_dora=True, target_modules=ALL, task_type="CAUSAL_LM"),
    "lora": lambda: PlainLoraConfig(r=5, lora_alpha=10, use_rslora=True, **OURS),
    "rasa": lambda: RasaConfig(r=4, shared_rank=2, **OURS),
    "rasa q": lambda: RasaConfig(r=4, shared_rank=2, **{**OURS, "target_modules": ["q_proj"]}),
    "sora": lambda: SoraConfig(r=4, allow_unscheduled=True, **OURS),
}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("algebra")
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    LlamaForCausalLM(config).save_pretrained(folder / "other")
    wide = LlamaConfig(**{**config.to_dict(), "intermediate_size": 64})
    LlamaForCausalLM(wide).save_pretrained(folder / "wide")
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, initializer_range=0.2))
    gpt2.save_pretrained(folder / "gpt2", max_shard_size="40KB")
    return {p.name: p for p in folder.iterdir()}


@pytest.fixture
def adapter(bases: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Saves a random adapter of a name in `CONFIGS`, on a base; another seed is another adapter."""

    def make(name: str, seed: int = 1, base: str = "llama") -> Path:
        out = tmp_path / f"{name.replace(' ', '-').replace(',', '')}-{seed}-{base}"
        shaken(bases[base], CONFIGS[name](), seed).save_pretrained(out)
        return out

    return make


def shaken(base: Path, config: PeftConfig, seed: int) -> PeftModel:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()
