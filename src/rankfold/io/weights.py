"""Safetensors read a header or a tensor at a time: names, shapes and types of files and of models, and single weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rankfold.errors import RankfoldError
from rankfold.io.weight_names import in_files

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Header:
    """What is known of a tensor without reading it; `dtype` in safetensors' letters (F32, BF16 …)."""

    shape: tuple[int, ...]
    dtype: str


def read_headers(file: Path) -> dict[str, Header]:
    """The headers of all tensors of one safetensors file, by name.

    Raises:
        RankfoldError: missing, truncated, or not safetensors.
    """
    with _opened(file) as tensors:
        parts = ((name, tensors.get_slice(name)) for name in tensors.keys())  # noqa: SIM118 (not a dict)
        return {name: Header(tuple(part.get_shape()), str(part.get_dtype())) for name, part in parts}


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file; errors as `read_headers`."""
    with _opened(file) as tensors:
        return dict(tensors.metadata() or {})


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a safetensors file as stored; errors as `read_headers`."""
    return next(tensor for _, tensor in read_tensors(file, [name]))


def read_tensors(file: Path, names: list[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a safetensors file as stored, one in memory at a time.

    Args:
        names: which; by default all.

    Raises:
        RankfoldError: as `read_headers`, or a tensor that torch cannot hold, by name.
    """
    with _opened(file) as tensors:
        for name in tensors.keys() if names is None else names:
            try:
                tensor = tensors.get_tensor(name)
            except (SafetensorError, AttributeError, RuntimeError, KeyError, TypeError) as error:
                raise RankfoldError(f"{file}: tensor {name!r} cannot be read: {error}") from None
            yield name, tensor


def weight_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a model folder; headers only."""
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        try:
            wanted: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {name: folder / file for name, file in wanted.items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise RankfoldError(f"{index} is not a valid index: {error!r}") from None
    elif single.is_file():
        files = dict.fromkeys(read_headers(single), single)
    else:
        raise RankfoldError(f"{folder} has no {SINGLE} and no index of one; save the model as safetensors")
    there = {file: read_headers(file) for file in set(files.values())}
    for name, file in files.items():
        if name not in there[file]:
            raise RankfoldError(f"{index} says that {name} is in {file.name}, but it is not; the model is incomplete")
    return files


def weight_reader(base: str | None, revision: str | None, model: nn.Module) -> Callable[[str], Tensor]:
    """Reads module weights of a base by module name, as stored, without widening them.

    Args:
        base: folder, or hub id in the local cache.
        model: the base, perhaps on the meta device, whose names transformers makes of those in the files.

    Returns:
        The reader, which looks for the files when it is first called: most adapters need no weight. It raises RankfoldError
        where the base has no safetensors, or no such weight in floating point.
    """

    @cache
    def files() -> dict[str, Path]:
        if not base:
            raise RankfoldError("this adapter's update depends on the base's weights; give the base with --base FOLDER")
        return base_files(base, revision)

    @cache
    def names() -> dict[str, list[str]]:
        return in_files(model, files())

    def read(module: str) -> Tensor:
        stored = names().get(f"{module}.weight", [])
        if not stored:
            raise RankfoldError(
                f"base={base!r} has no tensor {module + '.weight'!r}; give the base it was trained on with --base"
            )
        if len(stored) > 1:
            raise RankfoldError(
                f"base={base!r}: {module} is made of {len(stored)} tensors when it is loaded ({stored[0]} …), which this fold "
                "does not read; load the base with transformers, save it with save_original_format=False, and give --base"
            )
        name = stored[0]
        tensor = read_tensor(files()[name], name)
        if tensor.dtype not in FLOATS:
            raise RankfoldError(
                f"base={base!r}: {name} is {tensor.dtype}; give the unquantised base with --base FOLDER"
            )
        return tensor

    return read


def base_files(base: str, revision: str | None) -> dict[str, Path]:
    """The file of each tensor of a base model, a folder or a hub id in the local cache.

    Raises:
        RankfoldError: it has no safetensors here, or they are damaged.
    """
    first = _find(base, INDEX, revision) or _find(base, SINGLE, revision)
    if first is None:
        raise RankfoldError(
            f"base={base!r} has no {SINGLE} here, which holds the weights that this fold needs; give --base FOLDER with "
            "safetensors (save_pretrained of transformers writes them)"
        )
    return weight_files(first.parent)


def _find(base: str, name: str, revision: str | None) -> Path | None:
    if Path(base).is_dir():
        path = Path(base) / name
        return path if path.is_file() else None
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(
            base, name, revision=revision, local_files_only=True, _raise_exceptions_for_missing_entries=False
        )
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise RankfoldError(f"{file} cannot be read; it is missing, truncated or not safetensors: {error}") from None
