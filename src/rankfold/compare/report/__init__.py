"""A comparison as one self-contained HTML file."""

from __future__ import annotations

import json
from pathlib import Path

from rankfold.compare.report.page import render
from rankfold.compare.statistics import analyse
from rankfold.compare.trial_file import read
from rankfold.errors import RankfoldError
from rankfold.io.files import write_whole

__all__ = ["write_report"]


def write_report(out: str | Path, *, reference: str | None = None) -> Path:
    """Make OUT/report.html and OUT/analysis.json from OUT/trials.jsonl and OUT/compare.yaml.

    Args:
        out: folder of the comparison; a half-finished one will do.
        reference: contender the others are held against; None for plain LoRA, else the first.

    Returns:
        The report's path.

    Raises:
        ValueError: there are no trials, a line is not a trial line, they have several metrics, or the reference is not a contender.
        FileNotFoundError: no such folder.
    """
    out = Path(out)
    if not out.is_dir():
        raise FileNotFoundError(f"'{out}' is not a folder; give the output folder of a comparison")
    lines = read(out)
    if not lines:
        raise RankfoldError(f"{out / 'trials.jsonl'}: there are no trials yet; run `rankfold compare` first")
    analysis = analyse(lines, reference=reference)
    file = out / "compare.yaml"
    specification = file.read_text(encoding="utf-8") if file.is_file() else None
    page = render(analysis, lines, specification)
    write_whole(out / "analysis.json", json.dumps(analysis.to_json(), indent=1, ensure_ascii=False) + "\n")
    write_whole(out / "report.html", page)
    return out / "report.html"
