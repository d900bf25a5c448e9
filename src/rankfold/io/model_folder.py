"""The target weights of one model folder, read a tensor at a time; the model is never built with them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

from rankfold.errors import RankfoldError
from rankfold.io.files import sha256
from rankfold.io.models import ModelError, model_config, skeleton
from rankfold.io.weights import read_headers, read_tensor, weight_files


class ModelFolder:
    """The target weights of one model folder; only headers are read until `weight` asks for one."""

    def __init__(self, folder: Path, targets: Sequence[str]) -> None:
        self.folder, self.name = folder, folder.resolve().name
        if (folder / "adapter_config.json").is_file():
            raise RankfoldError(
                f"{folder} is an adapter; merge it into its base first (merge_and_unload, save_pretrained)"
            )
        try:
            self.type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RankfoldError(f"{folder} is not a model folder: its config.json cannot be read ({error!r})") from None
        self.files = weight_files(folder)
        self.headers = {file: read_headers(file) for file in set(self.files.values())}
        modules = {n.removesuffix(".weight") for n in self.files if n.endswith(".weight")}
        modules = sorted(m for m in modules if is_target(m, targets))
        missing = [t for t in targets if not any(is_target(m, [t]) for m in modules)]
        if missing:
            ends = sorted({n.removesuffix(".weight").rpartition(".")[2] for n in self.files if n.endswith(".weight")})
            raise RankfoldError(
                f"build_subspace: targets {', '.join(missing)} name no weight of {folder}; it has {', '.join(ends)}"
            )
        self.prefix = _common_prefix(modules)
        transposed = _conv1d_modules(folder)
        self.transposed = {m for m in modules if any(m == c or m.endswith("." + c) for c in transposed)}
        self.shapes = {m.removeprefix(self.prefix): self._shape(m) for m in modules}
        self.hashes = {f.name: sha256(f) for f in sorted(set(self.files.values()))}

    def about(self) -> dict[str, Any]:
        return {"name": self.name, "files": self.hashes}

    def check_same_architecture(self, other: ModelFolder) -> None:
        """Raises ValueError unless both have the same modules of the same shapes, whatever stands before their names."""
        if self.type != other.type:
            raise RankfoldError(
                f"{self.folder} is a {self.type} and {other.folder} a {other.type}; give models of one kind"
            )
        different = [m for m in {**self.shapes, **other.shapes} if self.shapes.get(m) != other.shapes.get(m)]
        if different:
            first = min(different)
            raise RankfoldError(
                f"{self.folder} and {other.folder} are not of one architecture: {first} has the shapes "
                f"{self.shapes.get(first)} and {other.shapes.get(first)}"
            )

    def weight(self, module: str) -> Tensor:
        """out × in in float64, by the name behind the prefix."""
        module = self.prefix + module
        path = self.files[f"{module}.weight"]
        w = read_tensor(path, f"{module}.weight").double()
        if not torch.isfinite(w).all():
            raise RankfoldError(f"{path} has NaN or infinity in {module}.weight; the model is damaged")
        return w.T if module in self.transposed else w

    def _shape(self, module: str) -> tuple[int, int]:
        name = f"{module}.weight"
        header = self.headers[self.files[name]][name]
        shape, dtype = list(header.shape), header.dtype
        if len(shape) != 2 or dtype not in ("F64", "F32", "BF16", "F16"):
            raise RankfoldError(
                f"{self.files[name]}: {name} is {dtype} of shape {shape}, and a subspace needs matrices of "
                "floating-point numbers; give unquantised models, and linear layers in targets"
            )
        return (shape[1], shape[0]) if module in self.transposed else (shape[0], shape[1])


def _common_prefix(modules: Sequence[str]) -> str:
    """What all names begin with, in whole parts."""
    first, last = (name.split(".")[:-1] for name in (min(modules), max(modules)))
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(part + "." for part, _ in same)


def _conv1d_modules(folder: Path) -> list[str]:
    """Modules that keep their weight as in × out (GPT-2's Conv1D); a file alone does not tell."""
    try:
        built = skeleton(model_config(folder), (AutoModel,))
    except ModelError:  # a model with code of its own: Conv1D is transformers' alone
        return []
    return [name for name, module in built.named_modules() if isinstance(module, Conv1D)]


def is_target(module: str, targets: Sequence[str]) -> bool:
    return any(module == t or module.endswith("." + t) for t in targets)
