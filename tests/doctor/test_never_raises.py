"""Whatever the bytes, a diagnosis is the answer: 300 damaged adapters, and none may raise, warn or hang."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from test_formats import gguf_file, mlx

from rankfold.doctor import diagnose
from rankfold.doctor.show import show

VALUES = (
    None,
    True,
    -1,
    0,
    1.5,
    10**40,
    "x",
    "(",
    "*",
    "[[a]",
    [],
    [1],
    {},
    {"q_proj": "4"},
    {"(": 4},
    {"r": {"r": []}},
    float("nan"),
    "\0",
)


def spoil_bytes(data: bytes, random: random.Random) -> bytes:
    """Flips, cuts, repeats or overwrites; mostly near the start, where headers are."""
    spoiled = bytearray(data)
    for _ in range(random.choice((1, 1, 3, 30))):
        at = (
            min(int(random.expovariate(1 / 300)), len(spoiled) - 1)
            if random.random() < 0.8
            else random.randrange(len(spoiled))
        )
        match random.randrange(4):
            case 0:
                spoiled[at] = random.randrange(256)
            case 1:
                del spoiled[at : at + random.choice((1, 8, 1000))]
            case 2:
                spoiled[at:at] = random.randbytes(random.choice((1, 8)))
            case 3:
                spoiled[at : at + 8] = random.choice((b"\xff" * 8, b"\0" * 8))
        if not spoiled:
            break
    return bytes(spoiled)


def spoil_config(text: str, random: random.Random) -> str:
    config = json.loads(text)
    for key in random.sample(sorted(config), min(3, len(config))):
        config[key] = random.choice(VALUES)
    config.pop(random.choice(sorted(config)))
    return json.dumps(config)


@pytest.mark.parametrize("kind", ["peft", "mlx", "gguf"])
def test_damage(kind: str, adapter, tmp_path: Path):
    match kind:
        case "peft":
            folder, weights = adapter(rank_pattern={"q_proj": 4}), "adapter_model.safetensors"
        case "mlx":
            (tmp_path / "mlx").mkdir()
            folder, weights = mlx(tmp_path / "mlx"), "adapters.safetensors"
        case _:
            (tmp_path / "gguf").mkdir()
            folder, weights = gguf_file(tmp_path / "gguf" / "lora.gguf", 8, 4).parent, "lora.gguf"
    console = Console(file=open(tmp_path / "out", "w", encoding="utf-8"), width=100)  # noqa: SIM115
    for seed in range(100):
        chance = random.Random(seed)
        copy = shutil.copytree(folder, tmp_path / f"copy{seed}")
        config = copy / "adapter_config.json"
        for path in (config, copy / weights):
            if path.exists() and chance.random() < 0.6:
                if path == config and chance.random() < 0.7:
                    path.write_text(spoil_config(path.read_text(), chance))
                else:
                    path.write_bytes(spoil_bytes(path.read_bytes(), chance))
        found = diagnose(copy)
        json.loads(found.to_json())
        console.print(show(found))
    console.file.close()
