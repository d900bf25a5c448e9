"""What an engine answered, against transformers.

Log-probabilities: the largest difference must be within the engine's bound. Text: every token that the engine wrote must be the one
that transformers finds likeliest after the same tokens, or be behind it by less than twice the bound: two log-probabilities that are
each off by the bound may change places. (llama.cpp, told to go on, never writes a token that ends a text; those do not count there.) So a text is judged to its end, also behind a token where the two part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from artefacts import log_probs
from torch import Tensor, nn

Run = list[dict[str, Any]]


@dataclass
class Measured:
    """Of one run.

    Args:
        error: largest difference of log-probabilities.
        scored: how many log-probabilities were compared.
        written: tokens in all, of all prompts.
        same: those that are transformers' likeliest.
        margin: by how much the worst of the others is behind it.
        moved: largest difference that the adapter makes to transformers' own log-probabilities; 0 for the base.
    """

    error: float
    scored: int
    written: int
    same: int
    margin: float
    moved: float = 0.0

    def failures(self, bound: float, steps: int, prompts: int) -> list[str]:
        found = []
        if not self.error <= bound:
            found.append(f"log-probabilities are off by {self.error:.2g}, the bound is {bound:g}")
        if not self.margin < 2 * bound:
            found.append(f"a token was written that transformers finds less likely than another by {self.margin:.2g}")
        if self.written != steps * prompts:
            found.append(f"{self.written} tokens were written instead of {steps * prompts}")
        return found


class Reference:
    """transformers' log-probabilities with one adapter, after whatever was written. The model is loaded for each new text and not
    kept: engines mostly write the same."""

    def __init__(self, load: Callable[[], nn.Module]) -> None:
        self._load = load
        self._known: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, ids: list[int]) -> Tensor:
        key = tuple(ids)
        if key not in self._known:
            self._known[key] = log_probs(self._load(), ids)
        return self._known[key]


def measure(
    run: Run, prompts: list[list[int]], reference: Reference, base: Reference | None = None, never: Sequence[int] = ()
) -> Measured:
    """How far one run is from transformers.

    Args:
        base: transformers without adapter.
        never: tokens that the engine does not write, however likely they are.
    """
    found = Measured(0.0, 0, 0, 0, 0.0)
    for entry, prompt in zip(run, prompts, strict=True):
        tokens = entry["tokens"]
        expected = reference([*prompt, *tokens])
        for score in entry["scores"]:
            row = expected[score["at"] - 1]
            off = (torch.tensor(score["logprobs"], dtype=torch.float64) - row[score["ids"]]).abs().max()
            found.error, found.scored = max(found.error, _number(off)), found.scored + len(score["ids"])
        rows = expected[len(prompt) - 1 : len(prompt) - 1 + len(tokens)]
        free = [i for i in range(rows.shape[1]) if i not in never]
        behind = rows[:, free].max(-1).values - rows[range(len(tokens)), tokens]
        found.written, found.same = found.written + len(tokens), found.same + int((behind <= 0).sum())
        found.margin = max(found.margin, _number(behind.max()))
        if base is not None:
            found.moved = max(found.moved, _number((base(prompt) - expected[: len(prompt)]).abs().max()))
    return found


def apart(one: Run, other: Run) -> float:
    """Largest difference of log-probabilities between two runs that should be the same; infinite where they write other tokens."""
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a["tokens"] != b["tokens"]:
            return float("inf")
        known = {s["at"]: dict(zip(s["ids"], s["logprobs"], strict=True)) for s in a["scores"]}
        for s in b["scores"]:
            pairs = zip(s["ids"], s["logprobs"], strict=True)
            worst = max([worst, *(abs(p - known[s["at"]][i]) for i, p in pairs if i in known[s["at"]])])
    return worst


def _number(t: Tensor) -> float:
    """NaN counts as infinitely far off."""
    return float(t) if torch.isfinite(t) else float("inf")
