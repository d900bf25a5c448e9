"""The base model's modules and their shapes, from its config.json or the headers of its weights; no weight is read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankfold.errors import RankfoldError
from rankfold.io.models import model_config, named_class, skeleton
from rankfold.io.weights import read_headers
from rankfold.tasks import table
from rankfold.text import one_line


@dataclass(frozen=True)
class BaseShapes:
    """One base model.

    Args:
        shapes: (out, in) of every matrix by module name; {} if it could not be had.
        why_not: why the shapes could not be had.
    """

    folder: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    why_not: str = ""


def read_base(folder: Path, adapter: dict[str, Any]) -> BaseShapes:
    """Reads a base folder.

    Args:
        adapter: the adapter's config; its task_type decides how modules are named.

    Raises:
        ValueError: the folder has no readable config.json.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise RankfoldError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise RankfoldError(f"base '{folder}': its config.json cannot be read ({error}); give --base FOLDER") from None
    try:
        return BaseShapes(folder, config, _skeleton(folder, config, adapter))
    except Exception as error:  # transformers raises anything on a config that it does not know
        if "quantization_config" in config:  # packed weights have other shapes
            return BaseShapes(folder, config, why_not=f"transformers cannot build it: {one_line(error)}")
    try:
        return BaseShapes(folder, config, _headers(folder))
    except (OSError, ValueError) as error:
        return BaseShapes(folder, config, why_not=one_line(error))


def _skeleton(folder: Path, config: dict[str, Any], adapter: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """From transformers' model class on the meta device."""
    task = table.of_peft_type(adapter.get("task_type"))
    mapping = adapter.get("auto_mapping")
    name = (mapping if isinstance(mapping, dict) else {}).get("base_model_class") or config["architectures"][0]
    if task is None and not hasattr(transformers, name):
        raise RankfoldError(f"transformers has no {name}")  # whose names could only be guessed
    maker = named_class(task.models[0] if task else name)
    model = skeleton(model_config(folder, local_files_only=True), (maker,))
    return {name: shape for name, m in model.named_modules() if (shape := _shape(m)) is not None}


def _shape(module: nn.Module) -> tuple[int, int] | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        return None
    out, into = weight.shape
    return (into, out) if isinstance(module, Conv1D) else (out, into)


def _headers(folder: Path) -> dict[str, tuple[int, int]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise RankfoldError("transformers does not know its architecture, and it has no safetensors")
    shapes = {}
    for file in files:
        for name, header in read_headers(file).items():
            if name.endswith(".weight") and len(header.shape) == 2:
                shapes[name.removesuffix(".weight")] = header.shape
    return shapes
