"""A model's shapes without its weights: built from its config alone, on the meta device."""

from __future__ import annotations

from pathlib import Path

import transformers
from torch import nn
from transformers import PretrainedConfig

from rankfold.io.models import ModelError, locate, model_config, skeleton
from rankfold.tasks import table


def meta_model(model_name: str, task: str | None = None, revision: str | None = None, labels: int = 2) -> nn.Module:
    """The model on the meta device. No weight is read, and of a GGUF file its header only.

    Args:
        model_name: a folder with a config.json, a GGUF file, a bundled name or a hub id.
        task: its name; None: the class that the config names.
        revision: of a hub id.
        labels: classes of a classification head.

    Raises:
        ModelError: no such model, a config that cannot be read, or an architecture without such a head.
    """
    row = table.get(task) if task is not None else None
    config = _config(model_name, revision)
    if row is not None and row.new_head:
        config.num_labels = labels
    makers = [getattr(transformers, name) for name in row.models] if row else ()
    try:
        return skeleton(config, makers).train()
    except ModelError as error:
        what = task or config.model_type
        raise ModelError(f"model: '{model_name}' makes no {what} model: {error}") from error


def _config(name: str, revision: str | None) -> PretrainedConfig:
    gguf = name.endswith(".gguf") and Path(name).expanduser().is_file()
    place = name if gguf else locate(name)
    try:
        return model_config(place, **({"revision": revision} if revision else {}))
    except ModelError as error:
        what = "the header of this GGUF file" if gguf else "its config"
        raise ModelError(f"model: '{name}': {what} cannot be read: {error}") from error
