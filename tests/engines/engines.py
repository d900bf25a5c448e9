"""One row per engine: what it takes, the script that runs inside it, and the bound that is asked of its log-probabilities."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artefacts import Model
from environments import HERE, environment


def as_it_is(model: Model, folder: Path) -> Path:
    return folder


def as_gguf(model: Model, folder: Path) -> Path:
    return model.gguf()


def as_ir(model: Model, folder: Path) -> Path:
    """OpenVINO's form of a model, beside it or, for the bundled one, in the cache."""
    from rankfold.io.cache import cached_folder

    def convert(out: Path) -> None:
        python = environment("openvino-convert")
        call([str(python), str(HERE / "inside" / "to_openvino.py"), str(folder), str(out)])

    if model.key == "smollm2":
        return cached_folder(f"{folder.name}-openvino", convert)
    out = folder.with_name(f"{folder.name}-openvino")
    if not out.exists():
        convert(out)
    return out


@dataclass(frozen=True)
class Engine:
    """One engine.

    Args:
        script: in the folder `inside`.
        doctor: its key in rankfold's doctor.
        profiles: those it takes.
        bound: of the largest error of a log-probability, in float32.
        compared: which log-probabilities it tells, in words.
        beside: how several adapters are served, in words.
        base: makes its form of a base model.
    """

    key: str
    name: str
    script: str
    doctor: str
    profiles: tuple[str, ...]
    bound: float
    compared: str
    beside: str
    base: Callable[[Model, Path], Path] = as_it_is
    file: str = ""

    def place(self, folder: Path) -> Path:
        """Of a fold's folder, what the engine is given."""
        return folder / self.file

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """What the engine says to a job (inside/job.py).

        Raises:
            Unavailable: its environment cannot be made here.
            EngineFailed: it stopped.
        """
        python = environment(self.key)
        with tempfile.TemporaryDirectory() as folder:
            asked, said = Path(folder, "job.json"), Path(folder, "answer.json")
            asked.write_text(json.dumps(job), encoding="utf-8")
            call([str(python), str(HERE / "inside" / self.script), str(asked), str(said)])
            return json.loads(said.read_text(encoding="utf-8"))


class EngineFailed(Exception):
    """An engine that stopped; the message is its last words."""


def call(command: list[str]) -> None:
    """Runs a script of `inside` with a clean environment, offline."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV_", "PYTEST"))}
    env = {**kept, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", check=False, timeout=1800)
    if done.returncode:
        raise EngineFailed("\n".join([*done.stdout.splitlines()[-5:], *done.stderr.splitlines()[-15:]]))


ENGINES = {
    e.key: e
    for e in (
        Engine(
            "vllm",
            "vLLM",
            "on_vllm.py",
            "vllm",
            ("uniform", "compact", "merged"),
            5e-4,
            "all tokens behind each prompt, the 20 likeliest at every later place",
            "in one engine, by request, also in one batch",
        ),
        Engine(
            "llama-cpp",
            "llama.cpp",
            "on_llama_cpp.py",
            "llama.cpp",
            ("gguf",),
            1e-3,
            "all tokens behind each prompt, the 20 likeliest at every later place",
            "in one server, by request",
            as_gguf,
            "adapter.gguf",
        ),
        Engine(
            "mistral-rs",
            "mistral.rs",
            "on_mistral_rs.py",
            "mistral.rs",
            ("uniform", "merged"),
            2e-2,
            "the 20 likeliest tokens at every place",
            "in one runner, by request",
        ),
        Engine(
            "openvino",
            "OpenVINO GenAI",
            "on_openvino.py",
            "openvino",
            ("uniform",),
            1e-3,
            "the token that was written, at every place",
            "in one pipeline, by request",
            as_ir,
            "adapter_model.safetensors",
        ),
        Engine(
            "mlx-lm",
            "mlx-lm",
            "on_mlx_lm.py",
            "mlx",
            ("mlx", "merged"),
            1e-3,
            "all tokens behind each prompt, the 20 likeliest at every later place",
            "one per model; the models in one process",
        ),
    )
}
