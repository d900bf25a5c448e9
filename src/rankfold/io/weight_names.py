"""Names of a model's weights in its files: transformers' own table of what it renames and fuses when it loads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

#: The model's name of a tensor by its name in a file, and whether it is a part of it only (one expert of fused ones).
ToModel = Callable[[str], tuple[str, bool]]


def to_model(model: nn.Module, prefix: bool = True) -> ToModel:
    """How the names in the files of a model become its own; a model that is not of transformers keeps them.

    Args:
        model: with or without adapters in it.
        prefix: whether names may have or lack the model's `base_model_prefix`, as in files; an adapter's may not.
    """
    state: dict[str, Any] = {k.replace(".base_layer", ""): True for k in model.state_dict()}
    if not isinstance(model, PreTrainedModel):
        return lambda name: (name, False)
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if not isinstance(c, WeightRenaming)]

    def name_of(name: str) -> tuple[str, bool]:
        if name in state:
            return name, False
        prefixed = model.base_model_prefix if prefix else None
        found, part_of = rename_source_key(name, renamings, converters, prefixed, state)  # pyright: ignore[reportArgumentType]
        return found, part_of is not None

    return name_of


def in_files(model: nn.Module, files: Iterable[str]) -> dict[str, list[str]]:
    """The names in its files that make each of the model's tensors; several where transformers fuses them."""
    name_of, found = to_model(model), {}
    for name in files:
        found.setdefault(name_of(name)[0], []).append(name)
    return found
