"""`rankfold doctor --fix OUT`: a copy of an adapter in which everything is mended that needs no more knowledge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rankfold.errors import RankfoldError
from rankfold.io.adapter_names import mended
from rankfold.io.adapters import CONFIG, PICKLED, WEIGHTS, find_adapter, is_narrow, stored_tensors
from rankfold.io.files import to_json, whole_folder
from rankfold.text import examples


def fix(path: str | Path, out: str | Path) -> list[str]:
    """Writes a mended copy; the adapter itself is never changed.

    Mends keys (names of wrappers, an adapter's name, a trained head under its wrapper's, a doubled or missing prefix), a whole-numbered float `lora_alpha` and
    nulls where PEFT wants an object, dtypes that no engine reads or that are mixed, and pickles of tensors alone.

    Args:
        path: folder of one of PEFT's adapters, or of the run that made it.
        out: a folder that does not exist.

    Returns:
        A sentence for each thing that was mended.

    Raises:
        FileExistsError: `out` exists.
        RankfoldError: the files cannot be read, two keys would become one, or nothing is to be mended.
    """
    folder, out = find_adapter(Path(path)), Path(out)
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RankfoldError(f"{folder} cannot be fixed: its {CONFIG} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise RankfoldError(f"{folder} cannot be fixed: its {CONFIG} is not an object")
    tensors, done = _tensors(folder)
    config, more = _config(content)
    done += more
    if not done:
        raise RankfoldError(f"{folder}: there is nothing that can be mended without knowing more")
    with whole_folder(out) as temporary:
        for file in folder.iterdir():
            if file.is_file() and file.name not in (CONFIG, WEIGHTS, PICKLED):
                shutil.copy(file, temporary)
        (temporary / CONFIG).write_text(to_json(config), encoding="utf-8")
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
    return done


def _tensors(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    found, done = stored_tensors(folder), []
    if not (folder / WEIGHTS).is_file():
        done.append(f"{PICKLED}, which held tensors alone, written as {WEIGHTS}")
    names = mended(found)
    if len(set(names.values())) < len(names):
        raise RankfoldError(f"{folder} cannot be fixed: several of its keys would become the same")
    if renamed := [key for key, name in names.items() if name != key]:
        done.append(f"keys renamed: {examples(renamed)}, now {names[renamed[0]]}")
    tensors = {names[key]: tensor.contiguous() for key, tensor in found.items()}
    kinds = {t.dtype for t in tensors.values() if t.is_floating_point()}
    if torch.float64 in kinds or len(kinds) > 1 or any(is_narrow(t) for t in tensors.values()):
        # float32 holds every value of the narrower ones
        tensors = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
        done.append(
            f"all tensors in float32; they were {', '.join(sorted(str(k).removeprefix('torch.') for k in kinds))}"
        )
    return tensors, done


def _config(content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    config, done = dict(content), []
    alpha = config.get("lora_alpha")
    if isinstance(alpha, float) and alpha.is_integer():
        config["lora_alpha"] = int(alpha)
        done.append(f"lora_alpha {alpha} written as {int(alpha)}")
    for key in ("rank_pattern", "alpha_pattern"):
        if key in config and config[key] is None:
            config[key] = {}
            done.append(f"{key} null written as {{}}")
    return config, done
