"""The weights of one model folder, read from its safetensors a tensor at a time; the model is never built with them."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

from rankfold.errors import RankfoldError


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
        try:
            with safe_open(path, "pt") as file:
                w = file.get_tensor(f"{module}.weight")
        except (SafetensorError, OSError) as error:
            raise RankfoldError(f"{path} cannot be read: {error}") from None
        w = w.double()
        if not torch.isfinite(w).all():
            raise RankfoldError(f"{path} has NaN or infinity in {module}.weight; the model is damaged")
        return w.T if module in self.transposed else w

    def _shape(self, module: str) -> tuple[int, int]:
        name = f"{module}.weight"
        with safe_open(self.files[name], "pt") as file:
            part = file.get_slice(name)
            shape, dtype = part.get_shape(), part.get_dtype()
        if len(shape) != 2 or dtype not in ("F64", "F32", "BF16", "F16"):
            raise RankfoldError(
                f"{self.files[name]}: {name} is {dtype} of shape {shape}, and a subspace needs matrices of "
                "floating-point numbers; give unquantised models, and linear layers in targets"
            )
        return (shape[1], shape[0]) if module in self.transposed else (shape[0], shape[1])


def weight_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a model folder; headers only."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            wanted: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {name: folder / file for name, file in wanted.items()}
        except (ValueError, KeyError, AttributeError) as error:
            raise RankfoldError(f"{index} is not a valid index: {error!r}") from None
    elif single.is_file():
        files = dict.fromkeys(_names(single), single)
    else:
        raise RankfoldError(f"{folder} has no model.safetensors and no index of one; save the model as safetensors")
    there = {file: _names(file) for file in set(files.values())}
    for name, file in files.items():
        if name not in there[file]:
            raise RankfoldError(f"{index} says that {name} is in {file.name}, but it is not; the model is incomplete")
    return files


def _names(file: Path) -> set[str]:
    try:
        with safe_open(file, "pt") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise RankfoldError(f"{file} cannot be read; it is missing, truncated or not safetensors: {error}") from None


def _common_prefix(modules: Sequence[str]) -> str:
    """What all names begin with, in whole parts."""
    first, last = (name.split(".")[:-1] for name in (min(modules), max(modules)))
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(part + "." for part, _ in same)


def _conv1d_modules(folder: Path) -> list[str]:
    """Modules that keep their weight as in × out (GPT-2's Conv1D); a file alone does not tell."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            skeleton = AutoModel.from_config(config, trust_remote_code=False)
    except ValueError:  # a model with code of its own: Conv1D is transformers' alone
        return []
    return [name for name, module in skeleton.named_modules() if isinstance(module, Conv1D)]


def is_target(module: str, targets: Sequence[str]) -> bool:
    return any(module == t or module.endswith("." + t) for t in targets)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
