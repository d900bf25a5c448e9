"""Single weights of a base model, read from its safetensors one at a time; the model is never built."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from rankfold.errors import RankfoldError
from rankfold.io.weights import weight_files

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_reader(base: str | None, revision: str | None, prefix: str) -> Callable[[str], Tensor]:
    """Reads module weights of a base by module name, as stored, without widening them.

    Args:
        base: folder, or hub id in the local cache.
        prefix: the model's `base_model_prefix`, which checkpoints may have or lack.

    Returns:
        The reader, which looks for the files when it is first called: most adapters need no weight. It raises ValueError
        where the base has no safetensors, or no such weight in floating point.
    """

    @cache
    def files() -> dict[str, Path]:
        if not base:
            raise RankfoldError("this adapter's update depends on the base's weights; give the base with --base FOLDER")
        return _files(base, revision)

    def read(module: str) -> Tensor:
        names = (f"{module}.weight", f"{prefix}.{module}.weight", f"{module}.weight".removeprefix(f"{prefix}."))
        name = next((n for n in names if n in files()), None)
        if name is None:
            raise RankfoldError(
                f"base={base!r} has no tensor {names[0]!r}; give the base it was trained on with --base"
            )
        try:
            with safe_open(files()[name], "pt") as f:
                tensor = f.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise RankfoldError(f"{files()[name]} cannot be read: {error}") from None
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise RankfoldError(
                f"base={base!r}: {name} is {tensor.dtype}; give the unquantised base with --base FOLDER"
            )
        return tensor

    return read


def _files(base: str, revision: str | None) -> dict[str, Path]:
    """Tensor name → the file it is in."""
    first = _find(base, INDEX, revision) or _find(base, SINGLE, revision)
    if first is None:
        raise RankfoldError(
            f"base={base!r} has no {SINGLE} here, and this adapter's update depends on the base's weights; "
            "give --base FOLDER with safetensors"
        )
    return weight_files(first.parent)


def _find(base: str, name: str, revision: str | None) -> Path | None:
    if Path(base).is_dir():
        path = Path(base) / name
        return path if path.is_file() else None
    try:
        found = cached_file(
            base, name, revision=revision, local_files_only=True, _raise_exceptions_for_missing_entries=False
        )
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)
