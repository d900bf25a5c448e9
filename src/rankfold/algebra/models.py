"""Two model folders side by side: their tensors by the model's own names, read a pair at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from rankfold.errors import RankfoldError
from rankfold.io.models import locate, model_config, skeleton
from rankfold.io.weight_names import ToModel, to_model
from rankfold.io.weights import FLOATS, Header, base_files, read_headers, read_tensor


@dataclass(frozen=True)
class ModelPair:
    """Two models of one type, of which only configs and headers are read until a tensor is asked for.

    Args:
        first, second: folders, or hub ids in the local cache.

    Raises:
        RankfoldError: models of different types, or without safetensors (when they are first looked for).
    """

    first: str
    second: str
    _read: dict[Path, dict[str, Header]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        one, other = (c.model_type for c in self.configs)
        if one != other:
            raise RankfoldError(f"{self.first} is a {one} and {self.second} a {other}; give two models of one type")

    @cached_property
    def configs(self) -> tuple[PretrainedConfig, PretrainedConfig]:
        return model_config(locate(self.first)), model_config(locate(self.second))

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The second model on the meta device, of the class it was saved from."""
        return skeleton(self.configs[1])

    @cached_property
    def name_of(self) -> ToModel:
        """The second model's name of a tensor in the files of either."""
        return to_model(self.skeleton)

    @cached_property
    def files(self) -> tuple[dict[str, tuple[Path, str]], dict[str, tuple[Path, str]]]:
        """For both, the name in the model → the file and the name in it; of what transformers fuses or splits when it loads, the
        file's own name."""

        def own(name: str) -> str:
            found, partly = self.name_of(name)
            return name if partly else found

        one, other = (
            {own(name): (file, name) for name, file in base_files(locate(model), None).items()}
            for model in (self.first, self.second)
        )
        return one, other

    @property
    def common(self) -> list[str]:
        """Names that both have, in the order of the second's file."""
        return [name for name in self.files[1] if name in self.files[0]]

    def only(self, which: int) -> list[str]:
        """Names that only one of them has."""
        return [name for name in self.files[which] if name not in self.files[1 - which]]

    def tensor(self, which: int, name: str) -> Tensor:
        """One tensor as stored."""
        return read_tensor(*self.files[which][name])

    def shape(self, which: int, name: str) -> tuple[int, ...]:
        """Of a tensor; from the file's header."""
        file, stored = self.files[which][name]
        return self._headers(file)[stored].shape

    def tensors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Both in float64; None for what is not a floating-point tensor in either.

        Raises:
            RankfoldError: one is quantised, or not finite.
        """
        found = self.tensor(0, name), self.tensor(1, name)
        floats = [t.dtype in FLOATS for t in found]
        if not any(floats):
            return None
        for model, tensor, is_float in zip((self.first, self.second), found, floats, strict=True):
            if not is_float:
                raise RankfoldError(f"{model}: {name} is {tensor.dtype}; give the unquantised model")
            if not torch.isfinite(tensor).all():
                raise RankfoldError(f"{model}: {name} is not finite; the model is damaged")
        return found[0].double(), found[1].double()

    def _headers(self, file: Path) -> dict[str, Header]:
        if file not in self._read:
            self._read[file] = read_headers(file)
        return self._read[file]

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The common floating-point tensors, one pair in memory at a time."""
        for name in self.common:
            if (found := self.tensors(name)) is not None:
                yield name, *found
