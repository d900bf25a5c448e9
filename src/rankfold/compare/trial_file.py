"""`trials.jsonl`: one JSON object per finished trial."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rankfold.errors import RankfoldError
from rankfold.io.files import append_line, read_json_lines

FILE = "trials.jsonl"

Status = Literal["done", "failed", "diverged"]


@dataclass(frozen=True, kw_only=True)
class TrialLine:
    """What a trial was and what it measured. Of a failed or diverged trial the measured fields are None or empty.

    Args:
        id: hash of what defines the trial.
        label: how the compare file calls the contender.
        method: its name in a run file, such as "peft:lora".
        where: name of the target variant; "all" where the file has none.
        rung: of successive halving, counted from 0, for a trial that was measured before its end and has `validation`
            but no `test`; the same trial at its end is another line, with None.
        added: of a grid that extends itself: 0 for the rates that it began with, else which of the rates added to it this is.
        reason: of a failure, one sentence.
        config: the method's fields as resolved.
        training: the optimiser and its options, where they are the contender's own.
        run: the whole run file.
        rows: digest of the rows of all splits; None in lines of earlier versions.
        metric: what `validation`, `test` and `before` are values of.
        validation: chooses the learning rate; of an unfinished rung, at its end.
        test: measured once, after training; `before` is the same before training.
        items: one score per test row, in the order of the rows.
        weights: of the items, so that their weighted mean is `test`; None for equal ones.
        curve: {"loss": [[step, value], ...], "validation": [[step, value], ...]}.
        parameters: trained, head, stored, folded, folded_rank; live: those trained at a time, where links or boosters follow each other.
        kept: parameters of the plain LoRA that holds just the components left after training, Σ rank·(in + out).
        ranks: by module, after training.
        seconds: in all optimiser steps; evaluation does not count. Of a trial that was resumed, from the time of a step
            since then.
        wall_seconds: of the trial's last process, loading and evaluation included.
        peak_bytes: of memory.
        adapter: folder, relative to the comparison's.
    """

    id: str
    label: str
    method: str
    where: str = "all"
    rate: float
    seed: int
    rung: int | None = None
    added: int | None = None
    status: Status
    reason: str | None = None
    config: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any]
    rows: str | None = None
    metric: str
    greater_is_better: bool
    validation: float | None = None
    test: float | None = None
    before: float | None = None
    items: list[float] | None = None
    weights: list[float] | None = None
    curve: dict[str, list[list[float]]] = field(default_factory=dict)
    parameters: dict[str, int | None] = field(default_factory=dict)
    kept: int | None = None
    ranks: dict[str, int] = field(default_factory=dict)
    steps: int | None = None
    seconds: float | None = None
    wall_seconds: float | None = None
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    adapter: str | None = None
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    threads: int | None = None
    host: str = ""

    def to_json(self) -> str:
        """One line, without its end; NaN and infinity, which JSON has not, become null."""
        return json.dumps(_finite(dataclasses.asdict(self)), ensure_ascii=False, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> TrialLine:
        """The line again; as `from_values`."""
        return TrialLine.from_values(json.loads(text))

    @staticmethod
    def from_values(values: object) -> TrialLine:
        """The line of a JSON object; fields of a later version are left out.

        Raises:
            RankfoldError: it is not a trial line.
        """
        if not isinstance(values, dict):
            raise RankfoldError("a trial line is a JSON object")
        known = {f.name for f in dataclasses.fields(TrialLine)}
        try:
            return TrialLine(**{key: value for key, value in values.items() if key in known})
        except TypeError as e:
            raise RankfoldError(f"not a trial line: {str(e).partition('() ')[2]}") from None


def read(path: str | Path) -> list[TrialLine]:
    """The lines of a comparison; of trials that were tried again, the last line of each.

    Args:
        path: trials.jsonl, or the comparison's folder; without a file there are no lines.

    Raises:
        RankfoldError: a line that is not a trial line, unless it is the last one and was cut off while it was written.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    found: dict[str, TrialLine] = {}
    for number, values in read_json_lines(path):
        try:
            line = TrialLine.from_values(values)
        except ValueError as e:
            raise RankfoldError(f"{path}:{number}: {e}; delete the line") from None
        found.pop(line.id, None)
        found[line.id] = line
    return list(found.values())


def append(path: str | Path, line: TrialLine) -> None:
    """Add a line that is on the disk when this returns; a half line that a kill left before it is cut off."""
    append_line(Path(path), line.to_json())


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
