"""Doctor's verdicts against the engines' own loaders (optional): a new version of an engine shows here what changed.

RANKFOLD_VLLM, RANKFOLD_SGLANG and RANKFOLD_MLX name the folder that holds the engine's package: a site-packages, or an unpacked
wheel. Without it, and where the package is not installed here, an engine is skipped; PEFT is always asked.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edits import EDITS
from test_formats import mlx

from rankfold.doctor import Status, diagnose

PACKAGES = {"vllm": "vllm", "sglang": "sglang", "mlx": "mlx_lm", "peft": "peft"}
#: Statuses of what a loader takes without a word, right or wrong.
TAKEN = {Status.LOADS, Status.MIS_SCALED, Status.WRONG, Status.IN_PART}


def refusals(engine: str, base: Path, folders: list[Path]) -> dict[str, str | None]:
    """What the engine's loader says of each folder; None where it takes it."""
    place = os.environ.get(f"RANKFOLD_{engine.upper()}")
    if place is None and importlib.util.find_spec(PACKAGES[engine]) is None:
        pytest.skip(f"{PACKAGES[engine]} is not installed, and RANKFOLD_{engine.upper()} names no folder that has it")
    script = Path(__file__).with_name("loaders.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), engine, str(base), *map(str, folders)],
        env={**os.environ, **({"PYTHONPATH": place} if place else {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def disagreements(engine: str, base: Path, folders: dict[str, Path]) -> dict[str, str]:
    """By edit, where the verdict is not what the loader did; what doctor leaves open does not count."""
    said = refusals(engine, base, list(folders.values()))
    found = {}
    for name, folder in folders.items():
        (verdict,) = diagnose(folder, base, [engine]).verdicts
        refused = said[str(folder)]
        if (verdict.status is Status.REFUSED and refused is None) or (verdict.status in TAKEN and refused is not None):
            found[name] = f"doctor: {verdict.status}; the loader: {refused or 'takes it'}"
    return found


@pytest.mark.parametrize("engine", ["vllm", "sglang", "peft"])
def test_edits_of_a_peft_folder(engine: str, adapter: Callable[..., Path], llama: Path, tmp_path: Path) -> None:
    sound = adapter(target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"])
    folders = {}
    for i, (name, edit) in enumerate(EDITS.items()):
        folders[name] = tmp_path / f"edit{i}"
        folders[name].mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (folders[name] / file).write_bytes((sound / file).read_bytes())
        edit(folders[name])
    assert not disagreements(engine, llama, folders)


def test_edits_of_an_mlx_folder(llama: Path, tmp_path: Path) -> None:
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    changes: dict[str, dict[str, Any]] = {
        "sound": {},
        "no num_layers": {"num_layers": None},
        "no scale": {"lora_parameters": {"rank": 4, "dropout": 0.0}},
        "another rank": {"lora_parameters": {**parameters, "rank": 8}},
        "the last layers alone": {"num_layers": 2},
        "all layers": {"num_layers": -1},
        "no layer": {"num_layers": 0},
        "a key in full": {
            "num_layers": 1,
            "lora_parameters": {**parameters, "keys": ["model.layers.0.self_attn.q_proj"]},
        },
        "a key's last part": {"lora_parameters": {**parameters, "keys": ["q_proj"]}},
        "another key": {"lora_parameters": {**parameters, "keys": ["self_attn.v_proj"]}},
        "no keys": {"lora_parameters": {key: value for key, value in parameters.items() if key != "keys"}},
        "whole weights": {"fine_tune_type": "full"},
    }
    folders = {}
    for i, (name, change) in enumerate(changes.items()):
        (folder := tmp_path / f"edit{i}").mkdir()
        folders[name] = mlx(folder, **{"num_layers": 3, "lora_parameters": parameters, **change})
    assert not disagreements("mlx", llama, folders)
