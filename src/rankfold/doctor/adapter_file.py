"""An adapter as it lies on the disk: which format, its config with line numbers, the headers of its tensors.

Nothing is unpickled, nothing is loaded: `io/weights.py` reads tensors one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rankfold.doctor import jsonlines
from rankfold.doctor.findings import Finding, Status
from rankfold.errors import RankfoldError
from rankfold.io import gguf_file
from rankfold.io.adapters import CONFIG, GATHER, not_gathered
from rankfold.io.formats.place import PICKLES, WEIGHTS, Place, find
from rankfold.io.weights import Header, read_headers, read_metadata, read_tensors
from rankfold.text import one_line


@dataclass
class AdapterFile:
    """One adapter.

    Args:
        kind: "peft", "mlx", "diffusers" or "gguf".
        weights: the file of the tensors, if there is one.
        config: adapter_config.json, or the metadata of the file where the format has no config; {} if unreadable.
        lines: the line of each key of the config.
        tensors: headers by name; empty if pickled or unreadable.
        pickled: the weights are a pickle, so nothing is known of the tensors.
        problems: what went wrong in reading. With any of them no engine can read it either.
    """

    path: Path
    kind: str
    weights: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, Header] = field(default_factory=dict)
    pickled: bool = False
    problems: list[Finding] = field(default_factory=list)

    def where(self, key: str) -> str:
        """The place of a config key, for a finding."""
        if self.kind == "gguf" or not self.lines:
            return key
        return f"{CONFIG}:{self.lines[key]} ({key})" if key in self.lines else f"{CONFIG} (no {key})"

    def read_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that torch can hold, one at a time.

        Raises:
            ValueError: a tensor that cannot be read, by name.
        """
        if self.weights is None or not self.tensors:
            return
        if self.kind == "gguf":
            for name, tensor in gguf_file.read_header(self.weights).tensors.items():
                values = gguf_file.read_tensor(self.weights, tensor)
                if values is not None:
                    yield name, values
            return
        yield from read_tensors(self.weights, list(self.tensors))


def open_adapter(path: Path) -> AdapterFile:
    """Finds and reads what `path` is.

    Args:
        path: a folder (or one that has the adapter in `adapter/`, as runs do), or a file of weights.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is not an adapter. A damaged adapter raises nothing: its problems are in the result.
    """
    if not path.exists():
        raise FileNotFoundError(f"'{path}' does not exist; give an adapter's folder or its file of weights")
    if (place := find(path)) is not None:
        return _read(place)
    if path.is_file():
        raise RankfoldError(f"'{path}' is not an adapter: it must be a folder, a .safetensors, a .gguf or a {CONFIG}")
    if not any(path.iterdir()):
        raise RankfoldError(f"'{path}' is an empty folder; give the folder that has {CONFIG}")
    model = "; its config.json says that it is a whole model" if (path / "config.json").exists() else ""
    raise RankfoldError(f"'{path}' is not an adapter: it has none of {CONFIG}, {', '.join(WEIGHTS)}{model}")


def _read(place: Place) -> AdapterFile:
    folder, weights = place.folder, place.weights
    file = AdapterFile(folder, place.kind, weights)
    if place.kind in ("peft", "mlx"):
        _read_config(folder / CONFIG, file)
    if weights is None:
        file.problems.append(
            Finding(Status.PROBLEM, "there are no weights", str(folder), "add adapter_model.safetensors")
        )
    elif weights.suffix in PICKLES:
        file.pickled = True
    else:
        _read_headers(weights, file)
    return file


def _read_config(path: Path, file: AdapterFile) -> None:
    if not path.exists():
        problem = f"there is no {CONFIG} beside the weights, so rank, alpha and targets are not known"
        file.problems.append(Finding(Status.PROBLEM, problem, str(path.parent), f"restore {CONFIG}"))
        return
    try:
        file.config, file.lines = jsonlines.parse(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        problem = f"it is not valid JSON: {one_line(error)}"
        file.problems.append(Finding(Status.PROBLEM, problem, CONFIG, "restore the file"))


def _read_headers(path: Path, file: AdapterFile) -> None:
    try:
        if path.stat().st_size == 0:
            raise RankfoldError("it is empty")
        with open(path, "rb") as raw:
            if raw.read(24) == b"version https://git-lfs.":
                raise RankfoldError("it is a git-lfs pointer and not the weights (git lfs pull)")
        if file.kind == "gguf":
            header = gguf_file.read_header(path)
            file.config = header.metadata
            file.tensors = {name: Header(t.shape, t.dtype) for name, t in header.tensors.items()}
            return
        file.tensors = read_headers(path)
        if file.kind == "diffusers":
            file.config = read_metadata(path)
        if not file.tensors:
            raise RankfoldError("it has no tensors")
        if message := not_gathered({name: header.shape for name, header in file.tensors.items()}):
            file.tensors = {}
            file.problems.append(Finding(Status.PROBLEM, message, path.name, GATHER))
            return
    except (ValueError, OSError) as error:
        file.tensors = {}
        problem = f"the weights cannot be read, they are truncated or not {path.suffix[1:]}: {one_line(error)}"
        file.problems.append(Finding(Status.PROBLEM, problem, path.name, "copy or download the file again"))
