"""A model's shapes without its weights: built from its config alone, on the meta device."""

from __future__ import annotations

import copy
import struct
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from rankfold.tasks import table
from rankfold.train.model import ModelError, locate


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
    makers = [getattr(transformers, name) for name in row.models] if row else _named(config)
    last: Exception | None = None
    for maker in makers:
        try:
            with torch.device("meta"):
                build = getattr(maker, "from_config", None) or maker._from_config
                made = build(config, dtype=getattr(config, "dtype", None) or torch.float32)
        except (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
            # An Auto class refuses a config that is not in its table; another one may have it
            last = error
        else:
            return made.train()
    if "Unrecognized configuration class" in str(last):
        raise ModelError(f"model: '{model_name}' is a {config.model_type}, which transformers has no {task} model of")
    raise ModelError(f"model: '{model_name}': its config makes no {config.model_type} model: {_first_line(last)}")


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy whose tensors have shapes only; what was tied stays tied."""
    hollow: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    hollow |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    return copy.deepcopy(model, hollow)


def _config(name: str, revision: str | None) -> PretrainedConfig:
    path = Path(name).expanduser()
    gguf = path.suffix == ".gguf" and path.is_file()
    options: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        if gguf:  # the header: transformers reads no tensor for this
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        return AutoConfig.from_pretrained(locate(name), **options)
    except ModelError:
        raise
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        ImportError,
        struct.error,
    ) as error:
        what = "the header of this GGUF file" if gguf else "its config"
        raise ModelError(f"model: '{name}': {what} cannot be read: {_first_line(error)}") from error


def _named(config: PretrainedConfig) -> tuple[Any, ...]:
    """The class that the config says it was saved from, else the bare model."""
    named = next(iter(config.architectures or []), "")
    found = getattr(transformers, named, None)
    return (found,) if found is not None else (AutoModel,)


def _first_line(error: Exception | None) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
