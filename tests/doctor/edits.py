"""Edits of an adapter's two files, and what is expected of a sound one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankfold.doctor import Diagnosis


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def sound(found: Diagnosis) -> bool:
    """No problem in the file, and loaded right but by Ollama, which is wrong on any llama's q_proj, and by OpenVINO, which reads
    no lora_alpha."""
    return not found.problems and {v.engine.key for v in found.failing} <= {"ollama", "openvino"}


def without(*keys: str) -> Callable[[Path], None]:
    """An edit that removes keys of the config."""

    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in keys}))

    return edit


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


def only(*kinds: str) -> Callable[[Path], None]:
    """An edit that leaves these types of modules."""

    def edit(folder: Path) -> None:
        edit_tensors(folder, lambda t: {k: v for k, v in t.items() if k.split(".lora_")[0].endswith(kinds)})
        edit_config(folder, target_modules=list(kinds))

    return edit


def rename(change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda t: {change(k): v for k, v in t.items()})


def add(name: str, *shape: int) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda t: {**t, f"base_model.model.{name}": torch.ones(shape)})


def narrow(folder: Path) -> None:
    """One module has half the rank that the config says."""

    def halved(t: dict[str, Tensor]) -> dict[str, Tensor]:
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
        a, b = t[key.format("A")], t[key.format("B")]
        half = len(a) // 2
        return {**t, key.format("A"): a[:half].clone(), key.format("B"): b[:, :half].clone()}

    edit_tensors(folder, halved)


#: Edits of a sound adapter of PEFT's on q, k, v, gate and up of a llama: what the engines' loaders are asked about.
EDITS: dict[str, Callable[[Path], None]] = {
    "sound": lambda folder: None,
    "rsLoRA": config(use_rslora=True),
    "float alpha": config(lora_alpha=16.0),
    "patterns of scales": config(alpha_pattern={"q_proj": 3}),
    "dora": config(use_dora=True),
    "lora_bias": config(lora_bias=True),
    "bias": config(bias="all"),
    "pissa": config(init_lora_weights="pissa"),
    "eva": config(init_lora_weights="eva"),
    "layer_replication": config(layer_replication=[[0, 1]]),
    "aLoRA": config(alora_invocation_tokens=[1, 2]),
    "head": config(modules_to_save=["lm_head"]),
    "regular expression": config(target_modules=".*q_proj"),
    "no r": without("r"),
    "no alpha": without("lora_alpha"),
    "no targets": without("target_modules"),
    "no peft_type": without("peft_type"),
    "rank above the limit": config(r=1024),
    "q alone": only("q_proj"),
    "k alone": only("k_proj"),
    "up alone": only("up_proj"),
    "gate alone": only("gate_proj"),
    "q and v": only("q_proj", "v_proj"),
    "adapter's name": rename(lambda k: k.replace(".weight", ".default.weight")),
    "wrapper": rename(lambda k: k.replace("base_model.model.", "base_model.model._orig_mod.")),
    "norm": add("model.layers.0.input_layernorm.weight", 32),
    "lora_B bias": add("model.layers.0.self_attn.q_proj.lora_B.bias", 32),
    "magnitude": add("model.layers.0.self_attn.q_proj.lora_magnitude_vector", 32),
    "narrow": narrow,
}
