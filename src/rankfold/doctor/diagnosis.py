"""The whole examination: read, check, ask every engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rankfold.doctor.adapter_file import AdapterFile, open_adapter
from rankfold.doctor.base_shapes import BaseShapes, read_base
from rankfold.doctor.case import Case, make_case
from rankfold.doctor.checks import check
from rankfold.doctor.engine_runs import EngineRun, engine_runs
from rankfold.doctor.engines import ENGINES, Verdict, judge
from rankfold.doctor.findings import Finding, Status
from rankfold.doctor.settings import read_settings
from rankfold.doctor.tensor_values import check_numbers
from rankfold.errors import RankfoldError
from rankfold.io.files import to_json
from rankfold.io.formats.place import FORMATS

#: What the verdicts are, and are not; printed with them.
BASIS = (
    "rules of these versions in November 2026, each checked by a run of the engine, by a run of its own loader, or by reading its "
    "source; nothing was started now"
)


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Args:
        path: the adapter, as it was given.
        summary: what it is, in a few words.
        asked: the engines were named by the caller, so each of them must load the adapter.
        findings: about the file itself: problems, then notes.
        verdicts: one an engine.
    """

    path: Path
    summary: str
    asked: bool
    findings: list[Finding]
    verdicts: list[Verdict]

    @property
    def problems(self) -> list[Finding]:
        return [f for f in self.findings if f.status is Status.PROBLEM]

    @property
    def failing(self) -> list[Verdict]:
        """Engines that do not load it right. What does not apply or could not be checked counts only if it was asked for."""
        bad = {Status.REFUSED, Status.WRONG, Status.MIS_SCALED, Status.IN_PART}
        return [v for v in self.verdicts if v.status in bad or (self.asked and v.status is not Status.LOADS)]

    @property
    def runs(self) -> list[EngineRun]:
        """Of the engines that were asked, those in which folds of ours were run."""
        known = engine_runs()
        return [known[v.engine.key] for v in self.verdicts if v.engine.key in known]

    @property
    def healthy(self) -> bool:
        return not self.problems and not self.failing

    def to_json(self) -> str:
        def plain(findings: Sequence[Finding]) -> list[dict[str, str]]:
            return [{"status": f.status, "what": f.what, "where": f.where, "fix": f.fix} for f in findings]

        runs = engine_runs()
        engines = [
            {
                "engine": v.engine.key,
                "name": v.engine.name,
                "version": v.engine.version,
                "known_by": v.engine.known,
                "date": v.engine.date,
                "folds_run": asdict(runs[v.engine.key]) if v.engine.key in runs else None,
                "status": v.status,
                "findings": plain(v.findings),
            }
            for v in self.verdicts
        ]
        result = {
            "path": str(self.path),
            "adapter": self.summary,
            "healthy": self.healthy,
            "basis": BASIS,
            "file": plain(self.findings),
            "engines": engines,
        }
        return to_json(result)


def diagnose(path: str | Path, base: str | Path | None = None, engines: Sequence[str] = ()) -> Diagnosis:
    """Examines an adapter: a folder or a file, of rankfold, PEFT, mlx-lm, diffusers or llama.cpp.

    Nothing is unpickled and no weight of the base is read; the adapter's own tensors are read one at a time.

    Args:
        base: the base model's folder; by default the one that the adapter names, if it is a local folder.
        engines: keys of the engines to ask (`ENGINES`); by default all.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is not an adapter, an engine is unknown, or `base` has no config.json. A damaged adapter raises
            nothing, its problems are the result.
    """
    unknown = sorted(set(engines) - {e.key for e in ENGINES})
    if unknown:
        raise RankfoldError(f"engine={unknown[0]!r} must be one of {', '.join(e.key for e in ENGINES)}")
    path = Path(path)
    file = open_adapter(path)
    settings, ill_typed = (
        read_settings(file) if file.kind == "peft" else (read_settings(AdapterFile(path, "none"))[0], [])
    )
    known_base, moved = _base(file, base)
    case = make_case(file, settings, known_base)
    found = [*file.problems, *ill_typed, *moved, *check(case), *check_numbers(file)]
    return Diagnosis(
        path=path,
        summary=_summary(case),
        asked=bool(engines),
        findings=sorted(found, key=lambda f: -f.status.severity),
        verdicts=[judge(e, case) for e in ENGINES if not engines or e.key in engines],
    )


def _base(file: AdapterFile, given: str | Path | None) -> tuple[BaseShapes | None, list[Finding]]:
    if given is not None:
        return read_base(Path(given), file.config), []
    named = file.config.get("base_model_name_or_path")
    if not isinstance(named, str) or "\0" in named or len(named) > 1024 or not Path(named).is_dir():
        return None, []
    try:
        return read_base(Path(named), file.config), []
    except ValueError as error:
        return None, [Finding(Status.NOTE, str(error), file.where("base_model_name_or_path"))]


def _summary(case: Case) -> str:
    kind = FORMATS[case.file.kind]
    if not case.file.tensors:
        return f"{kind}, tensors not read"
    dtypes = ", ".join(sorted({h.dtype for h in case.file.tensors.values()}))
    ranks = sorted({p.rank for p in case.pairs})
    rank = "" if not ranks else f", rank {ranks[0]}" if len(ranks) == 1 else f", ranks {ranks[0]} to {ranks[-1]}"
    if case.ours and ranks and ranks != [case.settings.r]:
        rank = f", r={case.settings.r} ({rank.removeprefix(', ')} in each module's own factors; what modules share is not counted)"
    type_ = f", {case.settings.peft_type}" if case.file.kind == "peft" else ""
    modules = f"{len(case.pairs)} modules" if case.pairs else f"{len(case.file.tensors)} tensors"
    return f"{kind}{type_}, {modules}{rank}, {dtypes}"
