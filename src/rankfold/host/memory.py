"""Whether an adapter of absurd size fits into memory, counted before anything is allocated."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from rankfold.errors import RankfoldError
from rankfold.text import size


def check_fits(config: Any, model: nn.Module, count: Callable[[], int]) -> None:
    """Raises RankfoldError for an adapter whose weights alone are more than all memory where the model is.

    It counts only where a number of the config is larger than every side of the model's weights: no method gains anything by a rank above
    min(in, out) of its layer, but PEFT's LoRA allows it, and so does ours.

    Args:
        count: how many parameters the adapter has, buffers included; called on the meta device.
    """
    field, value = max(_whole_numbers(config), key=lambda found: found[1], default=("", 0))
    shapes = [p.shape for p in model.parameters()]
    if value <= max((max(shape, default=0) for shape in shapes), default=0):
        return
    place = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    there = memory(place)
    try:
        with torch.device("meta"):
            needed = 4 * count()
        said = size(needed)
    except NotImplementedError:  # a start that reads the weights cannot be counted without them
        return
    except (RuntimeError, TypeError, OverflowError) as error:
        if "verflow" not in str(error):  # torch's word for more bytes than 64 bits can count
            raise
        needed, said = None, "more bytes than 64 bits can count"
    if needed is None or (there is not None and needed > there):
        layers = [min(shape) for shape in shapes if len(shape) == 2]
        raise RankfoldError(
            f"{type(config).__name__}: {field}={value} makes an adapter of {said} on this model, and "
            f"{'this machine' if place.type == 'cpu' else place} has {size(there or 0)}; choose a smaller {field.partition('.')[0]} (the "
            f"largest rank that a weight of this model has is {max(layers, default=1)})"
        )


def memory(device: torch.device) -> int | None:
    """All bytes of a device, used ones included; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


def _whole_numbers(config: Any) -> Iterator[tuple[str, int]]:
    """Whole numbers in the fields that say how large an adapter is, patterns included; a scale or a number of steps does not."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name, None)
        if field.name in ("alpha_pattern", "lora_alpha") or "step" in field.name:
            continue
        pairs = value.items() if isinstance(value, dict) else [(None, value)]
        for key, one in pairs:
            if isinstance(one, int) and not isinstance(one, bool):
                yield (field.name if key is None else f"{field.name}.{key}"), one
