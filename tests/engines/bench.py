"""One engine on one model: asks it for every fold that it takes, and judges what it says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from artefacts import ARTEFACTS, Artefact, Shelf
from judge import Measured, Reference, Run, apart, measure

from engines import Engine

STEPS, TOP = 64, 20


@dataclass
class Row:
    """What came of one fold in one engine.

    Args:
        failures: what is not as it must be; empty where it passed.
    """

    model: str
    profile: str
    artefact: str
    measured: Measured
    failures: list[str] = field(default_factory=list)


class Bench:
    """One model's folds and what transformers says with each, for any engine."""

    def __init__(self, shelf: Shelf, steps: int = STEPS) -> None:
        self.shelf, self.steps = shelf, steps
        self._references: dict[str | None, Reference] = {}

    def reference(self, artefact: Artefact | None) -> Reference:
        key = artefact.key if artefact else None
        if key not in self._references:
            self._references[key] = Reference(lambda: self.shelf.trained(artefact))
        return self._references[key]

    def run(self, engine: Engine, profiles: Sequence[str] = ()) -> tuple[str, list[Row]]:
        """The engine's version, and a row for the base and for every fold in every profile.

        Raises:
            Unavailable, EngineFailed: as `Engine.answer`.
        """
        wanted = [p for p in engine.profiles if not profiles or p in profiles]
        adapters = {f"{a.key}-{p}": (a, p) for p in wanted if p != "merged" for a in self.shelf.artefacts(p)}
        version, rows = self._adapters(engine, adapters)
        for artefact in self.shelf.artefacts("merged") if "merged" in wanted else ():
            folder = self.shelf.fold(artefact, "merged")
            said = engine.answer(self._job(str(engine.base(self.shelf.model, folder)), {}, [None], 0))
            rows.append(self._row(engine, artefact, "merged", said["runs"][0], said.get("never")))
        return version, rows

    def _adapters(self, engine: Engine, adapters: dict[str, tuple[Artefact, str]]) -> tuple[str, list[Row]]:
        """All in one engine, one after the other; then the first again, then none again, then all at once where it can."""
        model, first = self.shelf.model, next(iter(adapters))
        folds = {key: self.shelf.fold(*which) for key, which in adapters.items()}
        rank = max(_rank(folder) for folder in folds.values())
        places = {key: str(engine.place(folder)) for key, folder in folds.items()}
        order = [None, *adapters, first, None]
        said = engine.answer(self._job(str(engine.base(model, model.folder)), places, order, rank))
        runs, never = said["runs"], said.get("never")
        rows = [self._row(engine, None, "", runs[0], never)]
        for key, run in zip(adapters, runs[1:], strict=False):
            rows.append(self._row(engine, *adapters[key], run, never))
        for row, run, again, what in (
            (rows[1], runs[1], runs[-2], "switched to again"),
            (rows[0], runs[0], runs[-1], "switched off"),
        ):
            if (off := apart(run, again)) > engine.bound:
                row.failures.append(f"{what}, it answers otherwise: log-probabilities move by {off:.2g}")
        for row, run in zip([*rows, rows[1], rows[0]], said.get("together", []), strict=False):
            which = next((a for a in ARTEFACTS.values() if a.name == row.artefact), None)
            together = self._measure(which, run, never)
            row.failures += [f"asked beside the others: {f}" for f in self._failures(together, engine)]
        return said["version"], rows

    def _job(self, base: str, adapters: dict[str, str], runs: list[str | None], rank: int) -> dict[str, Any]:
        model = self.shelf.model
        prompts = [{"text": text, "ids": ids} for text, ids in zip(model.prompts, model.ids, strict=True)]
        return {
            "base": base, "adapters": adapters, "runs": runs, "rank": rank, "prompts": prompts, "steps": self.steps,
            "vocabulary": model.vocabulary, "top": TOP, "ends": model.ends,
        }  # fmt: skip

    def _row(self, engine: Engine, artefact: Artefact | None, profile: str, run: Run, never: list[int] | None) -> Row:
        found = self._measure(artefact, run, never)
        failures = self._failures(found, engine)
        if artefact and not found.moved > 50 * engine.bound:
            failures.append(f"the adapter moves log-probabilities by {found.moved:.2g} only, which shows nothing")
        return Row(self.shelf.model.name, profile, artefact.name if artefact else "base", found, failures)

    def _measure(self, artefact: Artefact | None, run: Run, never: list[int] | None) -> Measured:
        base = self.reference(None) if artefact else None
        return measure(run, self.shelf.model.ids, self.reference(artefact), base, never or [])

    def _failures(self, found: Measured, engine: Engine) -> list[str]:
        return found.failures(engine.bound, self.steps, len(self.shelf.model.ids))


def _rank(folder: Path) -> int:
    """The largest rank in a fold."""
    return json.loads((folder / "fold_report.json").read_text(encoding="utf-8"))["rank"]
