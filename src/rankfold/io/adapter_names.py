"""Keys of an adapter's file: those that PEFT writes, and those that wrappers, adapter names and copies left in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

PREFIX = "base_model.model."
#: Parts that wrappers put into names: torch.compile, FSDP, activation checkpointing. PEFT applies no tensor named so.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

T = TypeVar("T")

_NAMED = re.compile(
    r"\.(?P<part>lora_[AB](?=\.[^.]+\.weight$)|lora_embedding_[AB]|lora_magnitude_vector)\.(?P<name>(?!weight$)[^.]+)(\.weight$|$)"
)
#: Of a trained head, as a model's own state dict names it.
_HEAD = re.compile(r"\.modules_to_save\.((?P<name>[^.]+)\.(?=.)|(?=(weight|bias)$))")
_WRAPPED = re.compile(r"\.(base_layer|original_module|modules_to_save(\.[^.]+(?=\.(weight|bias)$))?)\.")
_FACTOR = re.compile(r"\.lora_([AB]\.weight|embedding_[AB]|magnitude_vector)$")


def mended(keys: Iterable[str]) -> dict[str, str]:
    """What PEFT would have called each key: without wrappers, adapter names and doubled prefixes, and with its prefix.

    An adapter's name (`lora_A.default.weight`, `score.modules_to_save.default.weight`) is taken out where the file holds one
    adapter.
    """
    keys = list(keys)
    names = {found["name"] for key in keys for part in (_NAMED, _HEAD) if (found := part.search(key))} - {None}
    whole = {key: _mended(key, len(names) == 1) for key in keys}
    if any(name.startswith(PREFIX) or _FACTOR.search(name) for name in whole.values()):
        whole = {key: name if name.startswith("base_model.") else PREFIX + name for key, name in whole.items()}
    taken = set(whole.values())  # beside embeddings PEFT saves a head a second time, as its wrapper holds it
    heads = {key: _HEAD.sub(".", name) for key, name in whole.items()} if len(names) < 2 else {}
    return {key: heads[key] if heads.get(key, name) not in taken else name for key, name in whole.items()}


def _mended(key: str, one_adapter: bool) -> str:
    parts = key.split(".")
    name = ".".join(part for part in parts if part not in WRAPPERS)
    if one_adapter:
        name = _NAMED.sub(_unnamed, name)
    name = name.removeprefix("module.") if name.startswith(f"module.{PREFIX}") else name
    while name.startswith(PREFIX * 2):
        name = name.removeprefix(PREFIX)
    return name


def _unnamed(found: re.Match[str]) -> str:
    part = found["part"]  # of linear layers a module's weight, else a parameter
    return f".{part}.weight" if part in ("lora_A", "lora_B") else f".{part}"


def wrapped(keys: Iterable[str]) -> list[str]:
    """Keys that hold a wrapper's name or a doubled prefix, which no reader knows."""
    return [k for k in keys if set(k.split(".")) & set(WRAPPERS) or k.startswith((f"module.{PREFIX}", PREFIX * 2))]


def without_copies(tensors: Mapping[str, T]) -> dict[str, T]:
    """Those of an adapter's tensors that it trained. Beside embeddings and heads PEFT saves what its own wrappers hold: the base's
    weight, and the trained one a second time."""

    def is_copy(key: str) -> bool:
        wrapped = key if ".lora_" in key else _WRAPPED.sub(".", key)  # a factor's base_layer is a place in a chain
        return wrapped != key and (".modules_to_save." not in key or wrapped in tensors)

    return {key: tensor for key, tensor in tensors.items() if not is_copy(key)}


def is_saved(key: str, modules_to_save: Iterable[str]) -> bool:
    """Whether `modules_to_save` names a module that this tensor lies in, by PEFT's rule: the END of a module's name, not of a
    whole part, so that "norm" names every `input_layernorm`."""
    parts = key.removeprefix(PREFIX).split(".")
    modules = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(name and module.endswith(name) for name in modules_to_save for module in modules)
