"""An adapter's folder: where it is, its config and its tensors."""

from __future__ import annotations

import ast
import json
import pickle
import re
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rankfold.errors import RankfoldError
from rankfold.host import registry
from rankfold.text import first_line

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LABELS = "labels.json"
"""The classes of an adapter's head in order of their index, as `rankfold train` writes them beside it."""


def find_adapter(path: Path) -> Path:
    """The adapter folder that `path` means: itself, its `adapter/` where it is a run's, or the folder of a file in it."""
    path = Path(path)
    if path.is_file() and path.name in (CONFIG, WEIGHTS, PICKLED) and (path.parent / CONFIG).is_file():
        return path.parent
    return next((folder for folder in (path, path / "adapter") if (folder / CONFIG).is_file()), path)


def read_config(folder: Path) -> PeftConfig:
    """The config of an adapter folder. Methods that were not imported are unknown to PEFT.

    Raises:
        FileNotFoundError: nothing is there.
        RankfoldError: it is not an adapter's, and where the adapter may be, or what is wrong with it.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist; give the folder of an adapter")
    if folder.is_file():
        raise RankfoldError(f"{folder} is a file; give the folder that has it and its {CONFIG}")
    if not path.is_file():
        raise RankfoldError(f"{folder} is not an adapter folder: it has no {CONFIG}{_where_it_may_be(folder)}")
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("peft_type")
    except (json.JSONDecodeError, AttributeError, UnicodeDecodeError) as error:
        raise RankfoldError(f"{path} is not valid: {error}") from None
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise RankfoldError(f"{path}: {registry.unknown_type(kind)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice about training
        return PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(str(folder))


def _where_it_may_be(folder: Path) -> str:
    """PEFT saves every adapter but the one called "default" in a folder of its name."""
    below = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if not below:
        return ""
    others = f" (and {len(below) - 1} more)" if len(below) > 1 else ""
    return f"; there is one in {below[0]}{others}"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """As `stored_tensors`, with float8, which has no arithmetic, widened to float32."""
    return {name: tensor.float() if is_narrow(tensor) else tensor for name, tensor in stored_tensors(path).items()}


def stored_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter in the dtypes that they were saved in.

    Args:
        path: its folder, or its file of weights.

    Raises:
        RankfoldError: the file is missing, truncated, a pickle of more than tensors, or was saved before its shards were
            gathered.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / name for name in (WEIGHTS, PICKLED) if (path / name).is_file()]
        if not files:
            raise RankfoldError(f"{path} has no {WEIGHTS}")
        path = files[0]
    if path.suffix == ".safetensors":
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise RankfoldError(f"{path} cannot be read; it is truncated or not a safetensors file: {error}") from None
    else:
        tensors = _unpickled(path)
    if message := not_gathered({name: tuple(tensor.shape) for name, tensor in tensors.items()}):
        raise RankfoldError(f"{path}: {message}; {GATHER}")
    return tensors


def _unpickled(path: Path) -> dict[str, Tensor]:
    """A state dict by torch's reader of tensors alone, which runs no code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about protocols of pickles, which fail or do not
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise RankfoldError(
            f"{path} is not a pickle of tensors alone, and opening any other can run code; if you trust it, read it with "
            f"torch.load(weights_only=False) and write its tensors into {WEIGHTS} with safetensors' save_file"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, struct.error) as error:
        raise RankfoldError(
            f"{path} cannot be read; it is truncated or not a file of torch: {first_line(error)}"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise RankfoldError(f"{path} is not an adapter's: it must hold a dict of tensors, as PEFT saves it")
    # A pickle keeps tied tensors in one memory, which safetensors writes only of tensors that have their own
    return {str(name): tensor.clone() for name, tensor in found.items()}


def write_labels(labels: Sequence[str], folder: Path) -> None:
    """What `read_labels` reads, where there are any."""
    if labels:
        (folder / LABELS).write_text(json.dumps(list(labels)) + "\n", encoding="utf-8")


def read_labels(folder: Path) -> list[str]:
    """The classes of a classifier's adapter in order of their index, where its folder says them: in a labels.json, in a
    config.json of the model beside it, or in the card that `rankfold train` writes; [] where none does.

    Raises:
        RankfoldError: labels.json is damaged.
    """
    if (stated := _stated_labels(folder)) is not None:
        return stated
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return _in_order(config["id2label"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
        found = re.search(r"id2label=(\{.*\})\)", card)
        return _in_order(ast.literal_eval(found[1])) if found else []
    except (OSError, ValueError, SyntaxError, TypeError):
        return []


def _stated_labels(folder: Path) -> list[str] | None:
    """What `rankfold train` wrote beside the adapter; None where it wrote nothing.

    Raises:
        RankfoldError: the file that says so is damaged.
    """
    folder = Path(folder)
    files = [folder / LABELS]
    if folder.parent.name == "checkpoints":  # of a run, whose adapter may be there already
        files.append(folder.parent.parent / "adapter" / LABELS)
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return None
    try:
        labels = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RankfoldError(f"{file} is not valid: {error}") from None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise RankfoldError(f"{file} is not valid: it must hold a list of names")
    return labels


@dataclass(frozen=True)
class Classes:
    """What training says of a classifier's head.

    Args:
        names: in order of their index; [] where they are not known.
        problem: transformers' `problem_type`, which its loss and its pipeline follow; None where it is not known.
    """

    names: list[str] = field(default_factory=list)
    problem: str | None = None


def read_classes(folder: Path) -> Classes:
    """Of an adapter, as far as its folder says them; errors as `read_labels`."""
    if _stated_labels(folder) is None:
        try:
            beside = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            return Classes(read_labels(folder), beside.get("problem_type"))
        except (OSError, ValueError, AttributeError):
            pass
    names = read_labels(folder)
    return Classes(names, "single_label_classification" if names else None)  # what `rankfold train` trains for


def classes_in(config: Any) -> Classes:
    """Of a model, as its config says them."""
    return Classes(labels_in(config), getattr(config, "problem_type", None))


def labels_in(config: Any) -> list[str]:
    """The classes in a model's config; [] where they have no names of their own."""
    return _in_order(getattr(config, "id2label", None) or {})


def _in_order(id2label: dict[Any, str]) -> list[str]:
    labels = {int(index): str(label) for index, label in id2label.items()}
    if sorted(labels) != list(range(len(labels))) or all(label == f"LABEL_{i}" for i, label in labels.items()):
        return []
    return [labels[i] for i in range(len(labels))]


def is_narrow(tensor: Tensor) -> bool:
    """Whether torch only stores it: float8."""
    return tensor.is_floating_point() and tensor.itemsize < 2


GATHER = (
    "gather the weights before saving (zero_to_fp32.py of the checkpoint, or stage3_gather_16bit_weights_on_model_save)"
)


def not_gathered(shapes: dict[str, tuple[int, ...]]) -> str:
    """Says which factors are empty, as ZeRO-3 leaves them on a process that holds no part of them; "" if none is."""
    empty = [name for name, shape in shapes.items() if shape == (0,) and name.endswith((".weight", ".up", ".down"))]
    if not empty:
        return ""
    return (
        f"{len(empty)} of {len(shapes)} tensors are empty (shape [0]), such as {empty[0]}: ZeRO-3 saved them in shards"
    )
