"""Names and rows of a model's linear layers in GGUF files, as llama.cpp's converter lays them out."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp's converter lays out the linear layers of a family.

    Args:
        name: gguf's MODEL_ARCH.
        interleaved: the rows of q and k are reordered so that the halves which the rotary embedding pairs alternate.
    """

    name: str
    interleaved: bool = False


#: By the model_type of the base. Closed: every family here is compared with transformers by running llama.cpp
#: (tests/fold/test_llama_cpp.py). Others may split, fuse or reorder weights.
ARCHITECTURES = {
    "llama": Architecture("LLAMA", interleaved=True),
    "mistral": Architecture("LLAMA", interleaved=True),
    "qwen2": Architecture("QWEN2"),
    "qwen3": Architecture("QWEN3"),
    "gemma2": Architecture("GEMMA2"),
    "gemma3_text": Architecture("GEMMA3"),
}


def need_gguf(what: str) -> Any:
    """The package gguf; raises ImportError that says how to get it."""
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"{what} needs the package gguf: pip install 'rankfold[gguf]'")
    import gguf

    return gguf


def stored_names(modules: list[str], base: PretrainedConfig) -> dict[str, str]:
    """The name of each module's weight in the base's GGUF file; layers outside the blocks, which are tied or ignored, have none."""
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[base.model_type].name], base.num_hidden_layers)
    names = {m: table.get_name(f"{m}.weight", try_suffixes=(".weight",)) for m in modules}
    return {module: name for module, name in names.items() if name is not None and name.startswith("blk.")}


def row_order(module: str, rows: int, base: PretrainedConfig) -> Tensor | None:
    """The rows of a module's weight in the order of the GGUF file, or None where that is the same."""
    heads = {"q_proj": base.num_attention_heads, "k_proj": base.num_key_value_heads}.get(module.rsplit(".", 1)[-1])
    if heads is None or not ARCHITECTURES[base.model_type].interleaved:
        return None
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)
