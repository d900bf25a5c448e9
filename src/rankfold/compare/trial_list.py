"""Lists the trials of a comparison. The list follows only from the compare file and the existing lines, so a comparison continues
after a kill, or after its file has grown."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rankfold.compare.contenders import Entry, identity
from rankfold.compare.file import CompareFile
from rankfold.compare.rates import given
from rankfold.compare.trial_file import TrialLine

FOLDER = "trials"


@dataclass(frozen=True)
class Trial:
    """One line to be measured.

    Args:
        line: what defines the trial; nothing is measured in it.
        until: the share of the steps after which it is measured.
        share: of the steps that are new in it, for estimates.
        folder: of the trial; rungs of one trial share it.
    """

    line: TrialLine
    until: float
    share: float
    folder: Path

    @property
    def id(self) -> str:
        return self.line.id

    def name(self) -> str:
        """The trial in words."""
        place = "" if self.line.where == "all" else f", {self.line.where}"
        until = "" if self.until == 1 else f", to {self.until:.3g} of the steps"
        return f"{self.line.label}{place}, rate {self.line.rate:g}, seed {self.line.seed}{until}"


def wanted(entry: Entry, file: CompareFile, done: Mapping[str, TrialLine]) -> tuple[list[Trial], int]:
    """The trials of one contender that are known to be needed, done ones included, and how many more will follow."""
    grid = entry.grid or given(file.rates, file.a_rate)
    added = dict.fromkeys(grid.first, 0 if grid.most else None)

    def measured(rates: Sequence[float], until: float, before: float) -> list[Trial]:
        pairs = [(rate, seed) for rate in rates for seed in file.choosing_seeds]
        return [make(entry, file, rate, seed, until, before, added[rate]) for rate, seed in pairs]

    trials: list[Trial] = []
    rates, before, rung = list(grid.first), 0.0, []
    for until in file.rungs:
        rung = measured(rates, until, before)
        trials += rung
        if any(t.id not in done for t in rung):
            return trials, _later(file, len(rates), until)
        if until < 1:
            rates = _ranked([done[t.id] for t in rung])[: math.ceil(file_keep(file) * len(rates))]
            before = until
    ended = [done[t.id] for t in rung]
    while True:
        ranked = _ranked(ended)
        diverged = any(done[t.id].status == "diverged" for t in trials)
        rate = grid.following(added, ranked, diverged)
        if rate is None:
            break
        added[rate] = len(added) - len(grid.first) + 1
        more = measured([rate], 1.0, 0.0)  # to the end at once: that is what the best rate's result is of
        trials += more
        if any(t.id not in done for t in more):
            return trials, _later(file, 1, 1.0)
        ended += [done[t.id] for t in more]
    rest = [seed for seed in file.seeds if seed not in file.choosing_seeds]
    return trials + [make(entry, file, r, seed, 1.0, 0.0, added[r]) for r in ranked[:1] for seed in rest], 0


def make(
    entry: Entry, file: CompareFile, rate: float, seed: int, until: float, before: float, added: int | None = None
) -> Trial:
    """The trial of a contender at a rate and a seed, whose steps up to the share `before` are made already; `added` as in its line."""
    run = file.run_file(entry.method, rate, seed, "-", entry.training)
    key = hash_of(run.model_dump(exclude_defaults=True, exclude={"output", "imports"}), file.launch)
    number = file.rungs.index(until)
    whole = until == 1
    folder = Path(file.output, FOLDER, key)
    run = run.model_copy(update={"output": str(folder / "run")})
    line = TrialLine(
        id=key if whole else f"{key}-{round(1000 * until):04d}",
        label=entry.label,
        method=entry.method["name"],
        where=entry.where,
        rate=rate,
        seed=seed,
        rung=None if whole else number,
        added=added,
        status="failed",
        reason=entry.reason,
        config={k: v for k, v in entry.method.items() if k != "name"},
        training=entry.training,
        run=run.model_dump(exclude_none=True),
        metric=run.metric,
        greater_is_better=run.greater_is_better,
    )
    return Trial(line, until, until - before, folder)


def hash_of(values: dict[str, Any], launch: str | None) -> str:
    """Twelve hex digits. Defaults are not in `values`, so that a field that a later version adds changes nothing."""
    text = json.dumps([values, launch] if launch else values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def file_keep(file: CompareFile) -> float:
    return 1.0 if isinstance(file.search, str) else file.search.halving.keep


def _later(file: CompareFile, rates: int, until: float) -> int:
    """How many trials follow a rung, unless some fail."""
    seeds, later = len(file.choosing_seeds), 0
    for _ in range(file.rungs.index(until) + 1, len(file.rungs)):
        rates = math.ceil(file_keep(file) * rates)
        later += rates * seeds
    return later + sum(seed not in file.choosing_seeds for seed in file.seeds)


def _ranked(lines: Sequence[TrialLine]) -> list[float]:
    """The rates from best to worst by mean validation; one that failed with some seed behind those that did not, one that
    failed with all left out. The smaller of equals comes first.

    By the same mean as `selection.choose`: a sum that depends on the order of the seeds would break ties otherwise.
    """
    scores: dict[float, list[float]] = {line.rate: [] for line in lines}
    for line in lines:
        if line.status == "done" and line.validation is not None:
            scores[line.rate].append(line.validation if line.greater_is_better else -line.validation)
    kept = {rate: values for rate, values in scores.items() if values}
    return sorted(kept, key=lambda rate: (-len(kept[rate]), -fmean(kept[rate]), rate))


def relabelled(
    trials: Sequence[Trial], entries: Sequence[Entry], done: Mapping[str, TrialLine]
) -> Iterator[tuple[TrialLine, str, str]]:
    """Finished trials that the compare file calls otherwise by now, with label and where; also those that it no longer asks for."""
    asked = {t.id: (t.line.label, t.line.where) for t in trials}
    same = {identity(e.method, e.training): (e.label, e.where) for e in entries}
    for old in done.values():
        names = asked.get(old.id) or same.get(identity({"name": old.method, **old.config}, old.training))
        if names and names != (old.label, old.where):
            yield old, *names
