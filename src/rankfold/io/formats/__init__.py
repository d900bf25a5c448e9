"""Adapters of any tool, read in PEFT's terms: one file per format."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
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
        base: the base model, where the format does not say it, or says a place that has moved; the config names it then. A
            revision in the config is that of the base which the adapter names, so any other has none.

    Raises:
        FileNotFoundError: nothing is there.
        RankfoldError: it is not an adapter, it is damaged, or what it needs to be read, by name.
    """
    place = find(Path(path)) or Place("peft", Path(path))
    read = _READERS[place.kind](place, base)
    if base is None or base == read.config.base_model_name_or_path:
        return read
    config = copy(read.config)
    config.base_model_name_or_path, config.revision = base, None
    return replace(read, config=config)
