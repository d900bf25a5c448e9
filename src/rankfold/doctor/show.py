"""A diagnosis for a terminal: what is wrong with the file, a line an engine, and the fixes."""

from __future__ import annotations

from collections import defaultdict

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rankfold.doctor.diagnosis import BASIS, Diagnosis
from rankfold.doctor.findings import Finding, Status
from rankfold.text import table

COLOURS = {
    Status.PROBLEM: "red",
    Status.NOTE: "yellow",
    Status.LOADS: "green",
    Status.IN_PART: "red",
    Status.MIS_SCALED: "red",
    Status.WRONG: "red",
    Status.REFUSED: "red",
}

#: How a row is known, in a word.
KNOWN = {"run": "run", "loader run": "loader", "source read": "read"}


def show(found: Diagnosis) -> Group:
    parts: list[Text | Table | Padding] = [Text.assemble((str(found.path), "bold"), f": {found.summary}")]
    for finding in found.findings:
        parts.append(_line(finding.status, finding))
        if finding.fix:
            parts.append(Padding(Text(f"fix: {finding.fix}"), (0, 0, 0, 2)))
    parts.append(_engines(found))
    parts += [Padding(Text(text), (0, 0, 0, 2), expand=False) for text in _fixes(found)]
    bad = [v.engine.name for v in found.failing]
    if found.healthy:
        verdict = Text("healthy: every engine that applies and could be checked loads it right", "green")
    else:
        n = len(found.problems)
        words = [f"{n} problem{'s' * (n > 1)} in the file"] if n else []
        words += [f"not right in {', '.join(bad)}"] if bad else []
        verdict = Text("; ".join(words), "bold red")
    basis = [BASIS]
    if found.runs:
        basis.append(f"folds of rankfold were run against transformers in {', '.join(map(str, found.runs))}")
    return Group(*parts, verdict, *(Text(text, "dim") for text in basis))


def _engines(found: Diagnosis) -> Table:
    """A row for each verdict with its reasons; engines that share both share the row."""
    rows: dict[tuple[Status, str], list[str]] = defaultdict(list)
    for v in found.verdicts:
        shown = [f for f in v.findings if f.status is v.status]
        rows[v.status, "\n".join(_sentence(f) for f in shown)].append(
            f"{v.engine.name} {v.engine.version} ({KNOWN[v.engine.known]})"
        )
    shown_engines = table("engine, known by", "verdict", "why", gap=1)
    shown_engines.columns[0].overflow = "fold"
    shown_engines.columns[2].overflow = "fold"  # the end of a tensor's name says which it is
    for (status, why), engines in rows.items():
        shown_engines.add_row("\n".join(engines), Text(status, COLOURS.get(status, "")), Text(why))
    return shown_engines


def _fixes(found: Diagnosis) -> list[str]:
    """Each fix once, with the engines that it helps."""
    helps: dict[str, list[str]] = defaultdict(list)
    for v in found.verdicts:
        for f in v.findings:
            if f.fix and f.status is v.status and v.engine.name not in helps[f.fix]:
                helps[f.fix].append(v.engine.name)
    return [f"fix for {', '.join(names)}: {fix}" for fix, names in helps.items()]


def _line(status: Status, finding: Finding) -> Text:
    return Text.assemble((f"{status}: ", COLOURS.get(status, "")), _sentence(finding))


def _sentence(finding: Finding) -> str:
    return f"{finding.what} [{finding.where}]" if finding.where and finding.where not in finding.what else finding.what
