"""The base model's modules and their shapes, from its config.json or the headers of its weights; no weight is read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from rankfold.errors import RankfoldError
from rankfold.host.kinds import kind_of
from rankfold.io.models import ModelError, model_config, named_class, skeleton
from rankfold.io.weight_names import ToModel, to_model
from rankfold.io.weights import read_headers
from rankfold.tasks import table
from rankfold.text import one_line


@dataclass(frozen=True)
class BaseShapes:
    """One base model.

    Args:
        shapes: (out, in) of an update of each module by its name; {} if they could not be had. A kernel's positions count as
            inputs, and an embedding's inputs are its rows.
        why_not: why the shapes could not be had.
        model: on the meta device, where the shapes are its.
        name_of: the model's name of a tensor by that in older files, and whether it is a part of it (one expert of fused ones).
    """

    folder: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    why_not: str = ""
    model: PreTrainedModel | None = None
    name_of: ToModel = lambda name: (name, False)

    def shape(self, module: str) -> tuple[int, int] | None:
        """(out, in) of a module by its name, by one that it once had, or by that inside an adapted nn.MultiheadAttention."""
        module = module.replace(".base_layer.", ".")
        return self.shapes.get(module) or self.shapes.get(self.name_of(f"{module}.weight")[0].removesuffix(".weight"))

    def name_now(self, module: str) -> str:
        """The model's name of a module by one that it once had; of one of several experts that are fused now, its own."""
        found, partly = self.name_of(f"{module}.weight")
        return module if partly else found.removesuffix(".weight")

    def has(self, module: str) -> bool:
        return self.shape(module) is not None or self.name_of(f"{module}.weight")[1]


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
        model = _skeleton(folder, config, adapter)
        shapes = {name: shape for name, m in model.named_modules() if (shape := _shape(m)) is not None}
        return BaseShapes(folder, config, shapes, model=model, name_of=to_model(model, prefix=False))
    except Exception as error:  # transformers raises anything on a config that it does not know
        if "quantization_config" in config:  # packed weights have other shapes
            return BaseShapes(folder, config, why_not=f"transformers cannot build it: {one_line(error)}")
    try:
        return BaseShapes(folder, config, _headers(folder))
    except (OSError, ValueError) as error:
        return BaseShapes(folder, config, why_not=one_line(error))


def _skeleton(folder: Path, config: dict[str, Any], adapter: dict[str, Any]) -> PreTrainedModel:
    """transformers' model class on the meta device: of the adapter's task if it has one for this base, else what the base or
    the adapter names."""
    mapping = adapter.get("auto_mapping")
    named = (mapping if isinstance(mapping, dict) else {}).get("base_model_class")
    task = table.of_adapter(adapter.get("task_type"), named or "")
    names = [n for n in (task.models[0] if task else None, named, *config.get("architectures", [])) if n]
    if not any(hasattr(transformers, name) for name in names):
        raise RankfoldError(f"transformers has no {names[:1]}")  # whose names could only be guessed
    known, failed = model_config(folder, local_files_only=True), None
    for name in names:
        try:
            return skeleton(known, (named_class(name),))
        except ModelError as error:
            failed = failed or error
    raise RankfoldError(str(failed))


def _shape(module: nn.Module) -> tuple[int, int] | None:
    if kind := kind_of(module):
        into, out = kind.features(module)
        return out, into
    weight = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else getattr(module, "weight", None)
    return (len(weight), weight.shape[1]) if isinstance(weight, torch.Tensor) and weight.ndim == 2 else None


def _headers(folder: Path) -> dict[str, tuple[int, int]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise RankfoldError("transformers does not know its architecture, and it has no safetensors")
    shapes = {}
    for file in files:
        for name, header in read_headers(file).items():
            if name.endswith((".weight", ".in_proj_weight")) and len(header.shape) >= 2:
                shapes[name.rpartition(".")[0]] = header.shape[0], math.prod(header.shape[1:])
    return shapes
