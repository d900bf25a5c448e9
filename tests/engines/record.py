"""Where results are kept: a JSON file in the package, which `rankfold doctor` quotes, and two tables in docs/serving.md made from it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from artefacts import ARTEFACTS
from bench import Row

from engines import ENGINES, Engine
from rankfold.io.files import to_json, write_whole

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "src" / "rankfold" / "doctor" / "engine_runs.json"
PAGE = ROOT / "docs" / "serving.md"
BEGIN, END = "<!-- written by make test-engines -->", "<!-- end of what make test-engines wrote -->"


def keep(engine: Engine, version: str, rows: list[Row]) -> None:
    """Puts an engine's results in place of its earlier ones."""
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    kept[engine.key] = {
        "name": engine.name,
        "doctor": engine.doctor,
        "version": version,
        "date": datetime.now(UTC).date().isoformat(),
        "bound": engine.bound,
        "compared": engine.compared,
        "error": max(row.measured.error for row in rows),
        "beside": engine.beside,
        "rows": [
            {
                "model": row.model,
                "profile": row.profile,
                "fold": row.artefact,
                "error": float(f"{row.measured.error:.2g}"),
                "moved": float(f"{row.measured.moved:.2g}"),
                "tokens": row.measured.written,
                "same": row.measured.same,
                "margin": float(f"{row.measured.margin:.2g}"),
            }
            for row in rows
        ],
    }
    write_whole(KEPT, to_json({key: kept[key] for key in ENGINES if key in kept}))


def write_table() -> None:
    """Into docs/serving.md, between the markers."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    write_whole(PAGE, f"{before}{BEGIN}\n{tables(json.loads(KEPT.read_text(encoding='utf-8')))}{END}{after}")


def tables(kept: dict[str, Any]) -> str:
    """Both tables, as Markdown."""
    lines = [
        "| engine | run on | bound | largest error | log-probabilities compared | several adapters |",
        "|---|---|---|---|---|---|",
    ]
    for e in kept.values():
        lines.append(
            f"| {e['name']} {e['version']} | {e['date']} | {e['bound']:.0e} | {e['error']:.1e} | {e['compared']} | {e['beside']} |"
        )
    folds = ["base", *(a.name for a in ARTEFACTS.values())]
    lines += ["", f"| engine, model | profile | {' | '.join(folds)} | greedy text |", "|" + "---|" * (len(folds) + 3)]
    for e in kept.values():
        base = {row["model"]: row for row in e["rows"] if row["fold"] == "base"}
        for model, profile in dict.fromkeys((row["model"], row["profile"]) for row in e["rows"] if row["profile"]):
            rows = {row["fold"]: row for row in e["rows"] if (row["model"], row["profile"]) == (model, profile)}
            shown = rows if profile == "merged" else {"base": base[model], **rows}
            cells = [f"{shown[fold]['error']:.1e}" if fold in shown else "–" for fold in folds]
            lines.append(
                f"| {e['name']}, {model} | `{profile}` | {' | '.join(cells)} | {_text(list(shown.values()))} |"
            )
    return "\n".join(lines) + "\n"


def _text(rows: list[dict[str, Any]]) -> str:
    """Of all the texts of a line."""
    tokens, same = sum(row["tokens"] for row in rows), sum(row["same"] for row in rows)
    if tokens == same:
        return f"{tokens} of {tokens} tokens"
    return f"{same} of {tokens} tokens, the others {max(row['margin'] for row in rows):.1e} behind"
