"""GGUF LoRA files of llama.cpp: the update of a module is adapter.lora.alpha / (its rank) · lora_b · lora_a, and without alpha
lora_b · lora_a (llama-adapter.h). Names and rows are those of the base's GGUF file, which its config tells."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from rankfold.errors import RankfoldError
from rankfold.io.formats.adapter import Pair, SavedAdapter, plain_lora
from rankfold.io.formats.place import Place
from rankfold.io.gguf_file import GgufHeader, read_header
from rankfold.io.gguf_names import ARCHITECTURES, need_gguf, row_order, stored_names
from rankfold.io.models import ModelError, model_config, skeleton
from rankfold.text import first_line, short_repr


def read(place: Place, base: str | None) -> SavedAdapter:
    """The adapter by the base's own names, rows in transformers' order.

    Raises:
        ImportError: the package gguf is missing.
        RankfoldError: the file is damaged or is not a LoRA; the base is not known, or of another family.
    """
    path = place.weights
    assert path is not None
    try:
        header = read_header(path)
    except (ValueError, OSError) as error:
        raise RankfoldError(f"{path} cannot be read: {error}") from None
    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
        if header.metadata.get(key) != wanted:
            raise RankfoldError(f"{path}: {key}={short_repr(header.metadata.get(key))}, so it is not a LoRA")
    base = base or _stated_base(header)
    if base is None:
        raise RankfoldError(f"{path}: a GGUF file has names and rows of its own; give the base with --base FOLDER")
    config = _config(base, header, path)
    layers = {n: m for n, m in skeleton(config, (AutoModelForCausalLM,)).named_modules() if isinstance(m, nn.Linear)}
    modules = {stored: module for module, stored in stored_names(list(layers), config).items()}
    tensors = _values(path)
    alpha = header.metadata.get("adapter.lora.alpha") or None
    if not isinstance(alpha, float | None):
        raise RankfoldError(f"{path}: adapter.lora.alpha={short_repr(alpha)} must be a number")
    pairs = {}
    for stored in dict.fromkeys(name.rpartition(".lora_")[0] or name for name in tensors):
        module, down, up = modules.get(stored), *(tensors.get(f"{stored}.lora_{side}") for side in "ab")
        if down is None or up is None:
            raise RankfoldError(f"{path}: {stored} has not both lora_a and lora_b; convert the adapter again")
        if module is None:
            raise RankfoldError(
                f"{path}: base={base!r} has no layer {stored} in its blocks; give the base it was trained on"
            )
        layer = layers[module]
        if up.ndim == 2 and len(up) != layer.out_features:
            raise RankfoldError(
                f"{path}: {stored} has {len(up)} rows and the layer of base={base!r} {layer.out_features}; give the base it was trained on"
            )
        order = row_order(module, len(up), config) if up.ndim == 2 else None
        pairs[module] = Pair(down, up if order is None else up[order.argsort()], alpha)
    note = [
        f"read as a GGUF LoRA, alpha {alpha:g}" if alpha else "read as a GGUF LoRA without alpha, so every scale is 1"
    ]
    return plain_lora(path, pairs, base, note, task_type="CAUSAL_LM")


def _stated_base(header: GgufHeader) -> str | None:
    url = header.metadata.get("general.base_model.0.repo_url")
    return url.removeprefix("https://huggingface.co/") if isinstance(url, str) else None


def _config(base: str, header: GgufHeader, path: Path) -> PretrainedConfig:
    try:
        config = model_config(base)
    except ModelError as error:
        raise RankfoldError(
            f"{path}: base={base!r}: its config.json cannot be read ({error}); give --base FOLDER"
        ) from None
    if config.model_type not in ARCHITECTURES:
        raise RankfoldError(
            f"{path}: model_type={config.model_type!r} of base={base!r} is not among those that were compared with llama.cpp "
            f"({', '.join(ARCHITECTURES)}); fold the adapter that it was converted from"
        )
    gguf = need_gguf(f"reading {path}")
    ours = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[ARCHITECTURES[config.model_type].name]]
    theirs = header.metadata.get("general.architecture")
    if theirs != ours:
        raise RankfoldError(f"{path} is of a {theirs} and base={base!r} is a {ours}; give the base it was trained on")
    return config


def _values(path: Path) -> dict[str, Tensor]:
    """Every tensor in float32; quantised ones as llama.cpp widens them."""
    import gguf

    try:
        stored = gguf.GGUFReader(path).tensors
        return {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in stored}
    except (ValueError, NotImplementedError, IndexError) as error:
        raise RankfoldError(f"{path} cannot be read: {first_line(error)}") from None
