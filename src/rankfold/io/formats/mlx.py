"""Adapters of mlx-lm: adapters.safetensors and adapter_config.json as `mlx_lm.lora` writes them.

    y = x Wᵀ + scale · (x lora_a) lora_b,      lora_a: in × r,  lora_b: r × out

Written from the source of mlx-lm 0.32.2 (tuner/lora.py, dora.py, utils.py). DoRA's `m` is what PEFT calls the magnitude vector.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from rankfold.errors import RankfoldError
from rankfold.io.adapter_names import PREFIX
from rankfold.io.adapters import CONFIG, read_tensors
from rankfold.io.formats.adapter import Pair, SavedAdapter, plain_lora
from rankfold.io.formats.place import Place
from rankfold.text import examples, short_repr


def read(place: Place, base: str | None) -> SavedAdapter:
    """The adapter by PEFT's names.

    Raises:
        RankfoldError: a config that is missing or damaged, whole weights (`fine_tune_type: full`), or tensors of other layers.
    """
    written = _config(place.folder / CONFIG)
    kind = written.get("fine_tune_type", "lora")
    if kind == "full":
        raise RankfoldError(
            f"{place.folder}: fine_tune_type='full' holds whole weights and no LoRA; fuse it into its base with mlx_lm.fuse, and "
            "make a LoRA with `rankfold extract BASE TUNED -o OUT --rank N`"
        )
    if kind not in ("lora", "dora"):
        raise RankfoldError(f"{place.folder / CONFIG}: fine_tune_type={short_repr(kind)} must be 'lora' or 'dora'")
    scale = _scale(written, place.folder / CONFIG)
    tensors = read_tensors(place.weights or place.folder)
    downs, ups, magnitudes = (_ending(tensors, end) for end in (".lora_a", ".lora_b", ".m"))
    rest = len(tensors) - len(downs) - len(ups) - (len(magnitudes) if kind == "dora" else 0)
    if rest or downs.keys() != ups.keys():
        known = {f"{name}{end}" for end in (".lora_a", ".lora_b", ".m") for name in downs.keys() & ups.keys()}
        odd = sorted(tensors.keys() - known) or sorted(tensors)
        raise RankfoldError(f"{place.weights}: tensors that are not pairs of lora_a and lora_b: {examples(odd)}")
    pairs = {name: Pair(_turned(downs[name]), _turned(ups[name]), scale=scale) for name in downs}
    model = written.get("model")
    base = base or (model if isinstance(model, str) else None)
    note = [f"read as an adapter of mlx-lm, scale {scale:g}"]
    read = plain_lora(place.folder, pairs, base, note, task_type="CAUSAL_LM", use_dora=kind == "dora")
    read.tensors.update({f"{PREFIX}{name}.lora_magnitude_vector": m for name, m in magnitudes.items()})
    return read


def _turned(matrix: Tensor) -> Tensor:
    return matrix.T if matrix.ndim == 2 else matrix  # any other is refused with its shape


def _ending(tensors: dict[str, Tensor], end: str) -> dict[str, Tensor]:
    return {name.removesuffix(end): tensor for name, tensor in tensors.items() if name.endswith(end)}


def _config(path: Path) -> dict[str, Any]:
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RankfoldError(
            f"{path.parent} has no {CONFIG}, which says the scale; restore what mlx_lm.lora wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise RankfoldError(f"{path} is not valid: {error}") from None
    if not isinstance(written, dict):
        raise RankfoldError(f"{path} is not valid: it must hold an object")
    return written


def _scale(written: dict[str, Any], path: Path) -> float:
    numbers = written.get("lora_parameters")
    scale = numbers.get("scale") if isinstance(numbers, dict) else None
    if not isinstance(numbers, dict) or not isinstance(scale, int | float) or isinstance(scale, bool):
        raise RankfoldError(f"{path}: lora_parameters must hold scale, a number; restore what mlx_lm.lora wrote")
    if "alpha" in numbers:
        product = f"scale·alpha/rank = {scale}·{numbers['alpha']}/{numbers.get('rank')}"
        raise RankfoldError(
            f"{path}: lora_parameters has alpha={short_repr(numbers['alpha'])}: old versions of mlx-lm (0.10) multiplied by {product}, "
            "today's ignore it; write the scale it was trained with and remove alpha"
        )
    return float(scale)
