"""Where an adapter is and of which format, from the names of its files and of its tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rankfold.errors import RankfoldError
from rankfold.io.adapters import CONFIG
from rankfold.io.gguf_file import read_header
from rankfold.io.weights import read_headers

FORMATS = {
    "peft": "a PEFT folder",
    "mlx": "an mlx adapter",
    "diffusers": "a diffusers file",
    "gguf": "a GGUF file",
}
#: Formats by the file that holds the weights. The order decides where a folder has several.
WEIGHTS = {
    "adapter_model.safetensors": "peft",
    "adapters.safetensors": "mlx",
    "pytorch_lora_weights.safetensors": "diffusers",
    "adapter_model.bin": "peft",
}
#: The ends of pickles.
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Place:
    """One adapter on the disk.

    Args:
        kind: of `FORMATS`.
        folder: that holds it.
        weights: the file of its tensors; None where a folder has none.
        alone: the file was given, and nothing beside it belongs to the adapter.
    """

    kind: str
    folder: Path
    weights: Path | None = None
    alone: bool = False

    @property
    def path(self) -> Path:
        """What the adapter is called."""
        return self.weights if self.alone and self.weights else self.folder


def find(path: Path) -> Place | None:
    """The adapter that `path` means: a folder, one that has it in `adapter/` as runs do, or a file; None where there is none."""
    if path.is_file():
        return _of_file(path)
    for folder in (path, path / "adapter"):
        for name, kind in WEIGHTS.items():
            if (folder / name).exists():
                return Place(kind, folder, folder / name)
        files = sorted(folder.glob("*.gguf")) if folder.is_dir() else []
        if len(files) == 1 and not (folder / CONFIG).exists():
            return Place("gguf", folder, files[0], alone=True)
        if (folder / CONFIG).exists():
            return Place("peft", folder)
    return None


def is_adapter(path: Path) -> bool:
    """Whether there is an adapter, and not a whole model in one file."""
    place = find(path)
    if place is None or place.kind == "peft":
        return place is not None and (place.folder / CONFIG).is_file()
    if place.kind != "gguf" or place.weights is None:
        return True
    try:
        return read_header(place.weights).metadata.get("general.type") == "adapter"
    except (RankfoldError, OSError):
        return False


def _of_file(path: Path) -> Place | None:
    if path.name == CONFIG:
        return find(path.parent)
    if path.suffix == ".gguf":
        return Place("gguf", path.parent, path, alone=True)
    if path.name in WEIGHTS:
        kind = WEIGHTS[path.name]
    elif path.suffix in PICKLES:
        kind = "peft"
    elif path.suffix == ".safetensors":
        kind = "peft" if _is_peft(path.parent / CONFIG) else _of_names(_names(path))
    else:
        return None
    return Place(kind, path.parent, path, alone=kind == "diffusers" or (kind == "peft" and path.name not in WEIGHTS))


def _is_peft(config: Path) -> bool:
    try:
        return "peft_type" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _of_names(names: Iterable[str]) -> str:
    names = list(names)
    if any(n.endswith((".lora_a", ".lora_b")) for n in names):
        return "mlx"
    foreign = names and not any(n.startswith("base_model.") for n in names) and any("lora" in n for n in names)
    return "diffusers" if foreign else "peft"


def _names(file: Path) -> list[str]:
    try:
        return list(read_headers(file))
    except RankfoldError:  # damaged: who reads it says so
        return []
