"""Keys of an adapter's config that PEFT does not know, and drops without a word: they may change the update."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from peft import PeftConfig

from rankfold.errors import RankfoldError
from rankfold.io.adapters import CONFIG
from rankfold.text import short_repr

#: Keys of other tools that only say where an adapter comes from.
_ORIGIN = ("model_type", "library_name", "transformers_version", "torch_dtype", "dtype", "auto_map", "architectures")


def check_keys(folder: Path, config: PeftConfig) -> list[str]:
    """Notes about the keys that are not read.

    Raises:
        RankfoldError: one that is set (neither null, false, zero nor empty), since it may change the update.
    """
    known = {field.name for field in dataclasses.fields(config)}
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    unknown = {key: value for key, value in content.items() if key not in known}
    harmless = [k for k, v in unknown.items() if not v or k.startswith("_") or k.endswith("_version") or k in _ORIGIN]
    for key in unknown.keys() - set(harmless):
        raise RankfoldError(
            f"{folder / CONFIG}: {key}={short_repr(unknown[key])} is not a key of {type(config).__name__} in this version of PEFT, "
            "and may change the update; remove the key if it does not, or fold with the version that wrote it"
        )
    return [f"keys of {CONFIG} that are not read: {', '.join(sorted(harmless))}"] if harmless else []
