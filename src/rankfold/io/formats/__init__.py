"""Adapters of any tool, read in PEFT's terms: one file per format."""

from __future__ import annotations

from pathlib import Path

from rankfold.io.formats import diffusion, gguf, mlx, peft
from rankfold.io.formats.adapter import SavedAdapter
from rankfold.io.formats.place import Place, find, is_adapter

__all__ = ["Place", "SavedAdapter", "find", "is_adapter", "read_adapter"]

_READERS = {"peft": peft.read, "mlx": mlx.read, "diffusers": diffusion.read, "gguf": gguf.read}


def read_adapter(path: str | Path, base: str | None = None) -> SavedAdapter:
    """An adapter of rankfold, PEFT, mlx-lm, diffusers, kohya or llama.cpp.

    Args:
        path: its folder, the folder of the run that made it, or its file of weights.
        base: the base model, where the format does not say it, or says a place that has moved.

    Raises:
        FileNotFoundError: nothing is there.
        RankfoldError: it is not an adapter, it is damaged, or what it needs to be read, by name.
    """
    place = find(Path(path)) or Place("peft", Path(path))
    return _READERS[place.kind](place, base)
