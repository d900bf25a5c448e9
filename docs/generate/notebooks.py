"""A tutorial's page as a notebook: its text as Markdown cells, its Python as code cells."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("first-adapter", "your-data", "lora-to-rasa")


def maker(page: Path) -> Callable[[], str]:
    return lambda: notebook(page.read_text(encoding="utf-8"))


def notebook(text: str) -> str:
    """The JSON of a notebook (nbformat 4.5), the same for the same text."""
    cells = []
    for part in re.split(r"^(```python\n.*?^```\n?)", text, flags=re.M | re.S):
        source = re.sub(r"^```(python)?\n?", "", part, flags=re.M) if part.startswith("```python") else part
        if source.strip():
            cells.append(_cell(len(cells), "code" if source is not part else "markdown", source.strip("\n")))
    about = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return (
        json.dumps(
            {"cells": cells, "metadata": about, "nbformat": 4, "nbformat_minor": 5}, indent=1, ensure_ascii=False
        )
        + "\n"
    )


def _cell(number: int, kind: str, source: str) -> dict[str, Any]:
    lines = source.splitlines(keepends=True)
    cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": lines}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})
