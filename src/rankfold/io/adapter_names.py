"""Keys of an adapter's file: those that PEFT writes, and those that wrappers, adapter names and copies left in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

PREFIX = "base_model.model."
#: Parts that wrappers put into names: torch.compile, FSDP, activation checkpointing. PEFT applies no tensor named so.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

_NAMED = re.compile(
    r"\.(?P<part>lora_[AB](?=\.[^.]+\.weight$)|lora_embedding_[AB]|lora_magnitude_vector)\.(?P<name>(?!weight$)[^.]+)(\.weight$|$)"
)
_WRAPPED = re.compile(r"\.(base_layer|original_module|modules_to_save(\.[^.]+(?=\.(weight|bias)$))?)\.")
_FACTOR = re.compile(r"\.lora_([AB]\.weight|embedding_[AB]|magnitude_vector)$")


def mended(keys: Iterable[str]) -> dict[str, str]:
    """What PEFT would have called each key: without wrappers, adapter names and doubled prefixes, and with its prefix.

    An adapter's name (`lora_A.default.weight`) is taken out where the file holds one adapter.
    """
    keys = list(keys)
    names = {found["name"] for key in keys if (found := _NAMED.search(key))}
    return {key: _mended(key, len(names) == 1) for key in keys}


def _mended(key: str, one_adapter: bool) -> str:
    parts = key.split(".")
    name = ".".join(part for part in parts if part not in WRAPPERS)
    if one_adapter:
        name = _NAMED.sub(_unnamed, name)
    name = name.removeprefix("module.") if name.startswith(f"module.{PREFIX}") else name
    while name.startswith(PREFIX * 2):
        name = name.removeprefix(PREFIX)
    if _FACTOR.search(name) and not name.startswith("base_model."):
        name = PREFIX + name
    return name


def _unnamed(found: re.Match[str]) -> str:
    part = found["part"]  # of linear layers a module's weight, else a parameter
    return f".{part}.weight" if part in ("lora_A", "lora_B") else f".{part}"


def wrapped(keys: Iterable[str]) -> list[str]:
    """Keys that hold a wrapper's name or a doubled prefix, which no reader knows."""
    return [k for k in keys if set(k.split(".")) & set(WRAPPERS) or k.startswith((f"module.{PREFIX}", PREFIX * 2))]


def without_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
