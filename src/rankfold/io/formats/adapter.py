"""An adapter in PEFT's terms, whatever tool wrote it."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from safetensors.torch import save_file
from torch import Tensor

from rankfold.errors import RankfoldError
from rankfold.host.peft_api import exact_pattern
from rankfold.io.adapter_names import PREFIX, mended
from rankfold.io.adapters import WEIGHTS


@dataclass(frozen=True)
class SavedAdapter:
    """One adapter.

    Args:
        path: its folder, or its file where that is all of it.
        config: as PEFT has it.
        tensors: by the keys in its file, or by those that PEFT writes where the file is another tool's.
        notes: what its user should know of how it was read.
        translated: `path` is not a folder that PEFT loads.
    """

    path: Path
    config: PeftConfig
    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    translated: bool = False

    @property
    def folder(self) -> Path:
        return self.path.parent if self.path.is_file() else self.path

    @property
    def named(self) -> dict[str, Tensor]:
        """Its tensors by the keys that PEFT writes."""
        names = mended(self.tensors)
        return {names[key]: tensor for key, tensor in self.tensors.items()}

    @contextmanager
    def for_peft(self) -> Iterator[Path]:
        """A folder of which PEFT applies every tensor: its own, or a temporary one."""
        named = self.named
        if not self.translated and named.keys() == self.tensors.keys():
            yield self.path
            return
        with tempfile.TemporaryDirectory(prefix="rankfold-") as folder:
            self.config.save_pretrained(folder)
            save_file({key: t.contiguous() for key, t in named.items()}, Path(folder) / WEIGHTS)
            yield Path(folder)


@dataclass(frozen=True)
class Pair:
    """The factors of one module: down is r × in, up is out × r, and the update is scale · up · down, where scale is alpha / r if
    there is an alpha. Of a convolution down is r × in × k × k and up is out × r × 1 × 1."""

    down: Tensor
    up: Tensor
    alpha: float | None = None
    scale: float = 1.0


def plain_lora(
    path: Path, pairs: Mapping[str, Pair], base: str | None, notes: list[str], **config: Any
) -> SavedAdapter:
    """A LoRA whose scales are α/r, in one config: patterns hold the modules that differ from most.

    Args:
        pairs: by the base model's name of the module.
        base: folder or hub id.
        config: more of `LoraConfig`'s fields.

    Raises:
        RankfoldError: no pair, or one that is not of a linear layer or a convolution, or of two ranks.
    """
    for module, pair in pairs.items():
        shapes = tuple(pair.down.shape), tuple(pair.up.shape)
        # Three sizes are of fused experts, and of convolutions of sequences, which no tool that is read here adapts
        if not pair.down.ndim == pair.up.ndim in (2, 4) or any(size != 1 for size in pair.up.shape[2:]):
            raise RankfoldError(
                f"{path}: the factors of {module} are {shapes[0]} and {shapes[1]}; only those of linear layers and of "
                "convolutions of images are read, and not of fused experts"
            )
        if pair.down.shape[0] != pair.up.shape[1] or not len(pair.down):
            raise RankfoldError(
                f"{path}: {module} has factors {shapes[0]} and {shapes[1]}, which are not of one rank above 0"
            )
    if not pairs:
        raise RankfoldError(f"{path} holds no factor of a LoRA")
    ranks = {module: pair.down.shape[0] for module, pair in pairs.items()}
    alphas = {m: pair.scale * ranks[m] if pair.alpha is None else pair.alpha for m, pair in pairs.items()}
    r, alpha = (Counter(found.values()).most_common(1)[0][0] for found in (ranks, alphas))
    tensors = {}
    for module, pair in pairs.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = pair.down
        tensors[f"{PREFIX}{module}.lora_B.weight"] = pair.up
    made = LoraConfig(
        r=int(r),
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  (PEFT takes any number)
        rank_pattern={exact_pattern(module): rank for module, rank in ranks.items() if rank != r},
        alpha_pattern={exact_pattern(module): found for module, found in alphas.items() if found != alpha},
        target_modules=sorted(pairs),
        base_model_name_or_path=base,
        inference_mode=True,
        **config,
    )
    return SavedAdapter(path, made, tensors, notes, translated=True)
