"""Find the last checkpoint that is whole: a run that is killed while it saves leaves one that is not."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import torch

from rankfold.errors import RankfoldError
from rankfold.io.weights import read_tensors

# Trainer writes trainer_state.json last.
FILES = ("adapter_config.json", "adapter_model.safetensors", "scheduler.pt", "trainer_state.json")


def last_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, or None, and a sentence for each newer one that is damaged."""
    numbered = {
        int(m[1]): path for path in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    skipped = []
    for _, path in sorted(numbered.items(), reverse=True):
        damage = what_is_damaged(path)
        if damage is None:
            return path, skipped
        skipped.append(f"{path.name} is incomplete: {damage}")
    return None, skipped


def other_processes(checkpoint: Path, now: int) -> list[str]:
    """A sentence where a checkpoint was made by another number of processes than there are now, of which each has its random state."""
    before = len(list(checkpoint.glob("rng_state*.pth")))
    if before == now:
        return []
    return [
        f"{checkpoint.name} was made by {before} process{'es' if before > 1 else ''}, and this run has {now}: from here on a step "
        f"takes {now}/{before} of the rows that it took, and the random numbers are others"
    ]


def what_is_damaged(checkpoint: Path) -> str | None:
    """Why Trainer could not continue from this checkpoint, or None."""
    for name in FILES:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    if not list(checkpoint.glob("optimizer*")):  # FSDP calls it optimizer.bin
        return "optimizer.pt is missing"
    if not list(checkpoint.glob("rng_state*.pth")):
        return "rng_state.pth is missing"
    for path in checkpoint.glob("*.json"):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return f"{path.name} is cut off"
    for path in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]:
        if not zipfile.is_zipfile(path):
            return f"{path.name} is cut off"
    try:
        for key, tensor in read_tensors(checkpoint / "adapter_model.safetensors"):
            if not bool(torch.isfinite(tensor).all()):
                return f"{key} holds NaN or infinite numbers"
    except RankfoldError:
        return "adapter_model.safetensors is cut off or foreign"
    return None
