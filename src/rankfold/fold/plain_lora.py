"""A plain LoRA from its tensors alone: no class of the base, and not even its config, is needed for the algebra."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import Tensor

from rankfold.errors import RankfoldError
from rankfold.fold.peft_updates import STARTS
from rankfold.fold.sites import GROUPED
from rankfold.fold.source import Source
from rankfold.host.adapter import Site
from rankfold.host.kinds import KINDS
from rankfold.host.peft_api import get_pattern_key
from rankfold.io.adapter_names import PREFIX, is_saved
from rankfold.io.adapters import read_classes
from rankfold.kernel.factors import Factors

#: What ends the keys of `down` and `up`: of linear layers and convolutions, and of embeddings.
_ENDS = {f".{kind.keys[0]}": f".{kind.keys[1]}" for kind in KINDS}
_FACTOR = tuple(end for both in _ENDS.items() for end in both)
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def is_plain(config: PeftConfig) -> bool:
    """Whether the update is scale · B A and no more."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    start = str(getattr(config, "init_lora_weights", "")).lower()
    return kind == "LORA" and not getattr(config, "use_dora", False) and start not in STARTS


def modules_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """The modules that a LoRA's tensors name, as the model it was trained on named them; those that PEFT wrapped for their
    parameters once, however many these are."""
    named = (
        key.removesuffix(end).removeprefix(PREFIX).replace(".base_layer", "")
        for key in tensors
        for end in _ENDS
        if key.endswith(end)
    )
    return list(dict.fromkeys(named))


def factors_of(tensors: Mapping[str, Tensor], config: Any, module: str) -> Factors:
    """A module's factors with PEFT's scale: α/r or α/√r, patterns matched against the end of the name.

    Raises:
        RankfoldError: a side is missing, or not of its kind's shape, or not of the rank that the config says.
    """
    end = _end(tensors, module)
    down, up = tensors[f"{PREFIX}{module}{end}"], tensors.get(f"{PREFIX}{module}{_ENDS[end]}")
    if up is None:
        raise RankfoldError(
            f"adapter_model.safetensors has {PREFIX}{module}{end} without its {_ENDS[end][1:].partition('.')[0]}; the file is "
            "incomplete"
        )
    if not 2 <= down.ndim == up.ndim <= 5 or any(size != 1 for size in up.shape[2:]):
        raise RankfoldError(f"{module}: its factors are {tuple(down.shape)} and {tuple(up.shape)}, which no layer has")
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    r = ranks.get(get_pattern_key(list(ranks), module), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)
    if up.ndim > 2 and up.shape[1] < r == down.shape[0]:
        raise RankfoldError(f"{module}: {GROUPED}")
    if down.shape[0] != r or up.shape[1] != r:
        raise RankfoldError(
            f"{module}: its tensors have rank {down.shape[0]} and {up.shape[1]}, the config says {r}; correct r or rank_pattern"
        )
    return Factors(down.flatten(1), up.flatten(1), scale=alpha / (r**0.5 if config.use_rslora else r))


def _end(tensors: Mapping[str, Tensor], module: str) -> str:
    return next(end for end in _ENDS if f"{PREFIX}{module}{end}" in tensors)


def _site(tensors: Mapping[str, Tensor], config: Any, module: str) -> Site:
    end, (out, into) = _end(tensors, module), factors_of(tensors, config, module).shape
    kernel = tuple(tensors[f"{PREFIX}{module}{end}"].shape[2:])
    kind = "convolution" if kernel else next(kind.name for kind in KINDS if f".{kind.keys[0]}" == end)
    return Site(module, into, out, kind, kernel)


def from_tensors(
    folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, why: str
) -> Source:
    """An adapter folder whose base is not looked at.

    Args:
        tensors: of the adapter, by the keys that PEFT writes.
        dtype: the base's, where it is known; else that of the adapter's tensors.
        why: that the base is not looked at, for the notes.

    Raises:
        RankfoldError: no factors, or tensors that are not a plain LoRA's.
    """
    modules = modules_of(tensors)
    kept = config.modules_to_save or []
    heads = {k: v for k, v in tensors.items() if not k.endswith(_FACTOR)}
    foreign = [key for key in heads if not is_saved(key, kept)]
    if foreign or not modules:
        what = (
            f"holds {len(foreign)} tensors that are not factors, such as {foreign[0]}"
            if foreign
            else "holds no LoRA factor"
        )
        raise RankfoldError(f"{folder} {what}; no LoRA can hold them (whole embeddings, biases), or it is not a LoRA")
    sites = [_site(tensors, config, module) for module in modules]

    def update(name: str) -> Factors:
        return factors_of(tensors, config, name).to("cpu", torch.float64)

    return Source(
        method="peft:lora",
        config=config,
        update=update,
        adapted=modules,
        sites=sites,
        modules=[*modules, *_absent(modules, config)],
        heads=heads,
        dtype=dtype or next(iter(tensors.values())).dtype,
        transposed=bool(config.fan_in_fan_out),
        output_head=next((m for m in modules if m.endswith("lm_head")), None),
        folder=folder,
        classes=read_classes(folder),
        notes=[why],
    )


def _absent(modules: list[str], config: LoraConfig) -> list[str]:
    """Names that the base may have besides, so that the target_modules of the fold do not name them too."""
    targets, layers = config.target_modules, [int(n) for m in modules for n in _LAYER.findall(m)[:1]]
    # A list of names meant every layer; a regular expression or chosen layers say nothing of those behind the last
    every = range(
        max(layers, default=0) + (1 if isinstance(targets, set | list) and not config.layers_to_transform else 2)
    )
    found = {_LAYER.sub(str(i), m, count=1) for m in modules for i in every}
    if isinstance(targets, set | list):
        found |= {f"other.{target.rpartition('.')[2]}" for target in targets if "." in target}
    return sorted(found - set(modules))
