"""What an adapter trains beside the updates of weights that are shown."""

from __future__ import annotations

from collections.abc import Iterable

from peft import PeftConfig

from rankfold.host.config import LowRankConfig
from rankfold.io.adapter_names import PREFIX, is_saved
from rankfold.text import examples


def left_out(keys: Iterable[str], config: PeftConfig) -> tuple[str, ...]:
    """A sentence for each kind of tensor in an adapter's file that no update shows.

    Args:
        keys: of all its tensors.
    """
    kept = getattr(config, "modules_to_save", None) or []
    found: dict[str, list[str]] = {}
    for key in keys:
        if kind := _kind(key, kept, isinstance(config, LowRankConfig)):
            found.setdefault(kind, []).append(key.removeprefix(PREFIX))
    return tuple(f"{kind}: {examples(names)}" for kind, names in found.items())


def _kind(key: str, kept: Iterable[str], ours: bool) -> str:
    if ".base_layer." in key or (ours and ".lowrank_" in f".{key}"):
        return ""
    if "trainable_tokens" in key:
        return "trained tokens"
    if is_saved(key, kept):
        return "modules_to_save"
    if key.endswith(".bias"):
        return "biases"
    return "" if ".lora_" in key else "other tensors"


def left_out_of(config: PeftConfig) -> tuple[str, ...]:
    """The same of a live model's adapter, by its config."""
    fields = {
        "modules_to_save": "modules_to_save",
        "trained tokens": "trainable_token_indices",
    }
    found = [f"{kind}: {value}" for kind, field in fields.items() if (value := getattr(config, field, None))]
    bias = getattr(config, "bias", "none")
    return tuple(found) + ((f"biases: {bias}",) if bias not in ("none", None) else ())
