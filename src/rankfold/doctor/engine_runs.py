"""Runs of our folds in the engines themselves, as `make test-engines` kept them in engine_runs.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class EngineRun:
    """What one engine did with folds of ours.

    Args:
        date: of the run, ISO.
        error: largest difference of a log-probability from transformers with the trained adapter.
        bound: of `error`, above which the run would have failed.
        folds: how many were run, in how many profiles.
        profiles: their names.
    """

    name: str
    version: str
    date: str
    error: float
    bound: float
    folds: int
    profiles: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.version} on {self.date} ({self.folds} folds, within {self.error:.0e})"


@cache
def engine_runs() -> dict[str, EngineRun]:
    """By the doctor's key of the engine."""
    kept = json.loads((files("rankfold.doctor") / "engine_runs.json").read_text(encoding="utf-8"))
    found = {}
    for run in kept.values():
        folds = [row for row in run["rows"] if row["fold"] != "base"]
        found[run["doctor"]] = EngineRun(
            run["name"], run["version"], run["date"], run["error"], run["bound"], len(folds),
            tuple(dict.fromkeys(row["profile"] for row in folds)),
        )  # fmt: skip
    return found
