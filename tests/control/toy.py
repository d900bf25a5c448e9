"""Two layers, their data, and a short schedule for every method: what the tests of controllers train."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from rankfold import (
    AdaSvdConfig,
    DeltaLoraConfig,
    DynamicDoraConfig,
    RacLoraConfig,
    RasaConfig,
    SoraConfig,
    XgbLoraConfig,
)
from rankfold.host.adapter import Adapter
from rankfold.host.config import LowRankConfig
from rankfold.host.linear_layer import AdaptedLinear

# Threads that wait for each other would take longer than these sums
torch.set_num_threads(1)

STEPS = 12
#: Every schedule cuts several times within STEPS, and reaches its end.
SHORT: dict[str, dict[str, Any]] = {
    "sora": {"r": 4, "threshold": 0.05},
    "adalora": {"r": 4, "target_r": 2, "tinit": 1, "tfinal": 3, "deltaT": 2},
    "dynamic_dora": {"r": 4, "target_r": 2, "interval": 2, "start": 0.15, "end": 0.3},
    "rasa": {"r": 4, "shared_rank": 1},
    "rac_lora": {"r": 2, "links": 4},
    "xgblora": {"link_steps": 2, "layers_drawn": 1},
    "delta_lora": {"r": 4, "start_step": 2, "lora_dropout": 0.0},
}
CLASSES: dict[str, type[LowRankConfig]] = {
    "sora": SoraConfig, "adalora": AdaSvdConfig, "dynamic_dora": DynamicDoraConfig, "rasa": RasaConfig,
    "rac_lora": RacLoraConfig, "xgblora": XgbLoraConfig, "delta_lora": DeltaLoraConfig,
}  # fmt: skip
SCHEDULED = ["sora", "adalora", "dynamic_dora"]


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def config(method: str, **changes: Any) -> LowRankConfig:
    return CLASSES[method](**{"target_modules": ["a", "b"], "lora_dropout": 0.2, **SHORT[method], **changes})


def adapted(method: str, *, seed: int = 1, dtype: torch.dtype = torch.float32, **changes: Any) -> PeftModel:
    """The toy in train mode; its base weights are always the same, the adapter's first values are the seed's."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        base = Toy().to(dtype)
        torch.manual_seed(seed)
        return get_peft_model(base, config(method, **changes)).train()  # pyright: ignore[reportArgumentType, reportReturnType]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model: nn.Module, lr: float = 0.05, **kwargs: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(trainable(model), lr=lr, **kwargs)


def batch(step: int, rows: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(rows, 6, generator=g).to(dtype), torch.randn(rows, 5, generator=g).to(dtype)


def loss(model: nn.Module, step: int, **kwargs: Any) -> Tensor:
    x, y = batch(step, **kwargs)
    return F.mse_loss(model(x), y)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()


def adapters(model: nn.Module, name: str = "default") -> list[Any]:
    found: list[Adapter] = []
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            found += module.adapters([name])
    return found


def state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Copies of an adapter's tensors."""
    saved = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {k: v.detach().clone() for k, v in saved.items()}


def alive(model: nn.Module) -> list[int]:
    return [a.alive() for a in adapters(model)]


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Bit for bit the same, nested as it may be."""
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), f"{where} differs by {(a.double() - b.double()).abs().max()}"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def processes() -> Any:
    """Children that need not import everything again: they fork from a server that has."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "peft", "rankfold", "rankfold.train.checkpoints"])
    return context


# For Trainer ---------------------------------------------------------------------------------------------------------


def llama(method: str, *, seed: int = 1, **changes: Any) -> PeftModel:
    """A causal language model of two layers and 48 words, with dropout in the base and in the adapter."""
    quiet = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        base = LlamaForCausalLM(
            LlamaConfig(vocab_size=48, max_position_embeddings=32, attention_dropout=0.1, **sizes, **quiet)
        )
        torch.manual_seed(seed)
        wanted = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **changes}
        return get_peft_model(base, config(method, **wanted))  # pyright: ignore[reportReturnType]


def rows(count: int = 16) -> list[dict[str, list[int]]]:
    ids = torch.randint(3, 48, (count, 8), generator=torch.Generator().manual_seed(3)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    wanted = {
        "max_steps": STEPS,
        "learning_rate": 0.05,
        "per_device_train_batch_size": 2,
        "save_steps": 4,
        "logging_steps": 2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(folder), **{**wanted, **changes})


def trainer(model: nn.Module, folder: Path, *callbacks: Any, **changes: Any) -> Trainer:
    made = Trainer(
        model, arguments(folder, **changes), train_dataset=rows(), eval_dataset=rows(4), callbacks=[*callbacks]
    )  # pyright: ignore[reportArgumentType]
    made.remove_callback(PrinterCallback)
    return made
