"""Edits of an adapter's two files, and what is expected of a sound one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from rankfold.doctor import Diagnosis


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def sound(found: Diagnosis) -> bool:
    """No problem in the file, and loaded right but by Ollama, which is wrong on any llama's q_proj, and by OpenVINO, which reads
    no lora_alpha."""
    return not found.problems and {v.engine.key for v in found.failing} <= {"ollama", "openvino"}
