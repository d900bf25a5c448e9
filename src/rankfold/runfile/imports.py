"""`imports:` of run files and compare files: what registers a third party's method, before its name is looked up."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankfold.errors import RankfoldError
from rankfold.host.plugins import is_path, load_plugin, placed
from rankfold.runfile.problems import Problem

DESCRIPTION = "Modules or files (./my_method.py, from this file's folder) that register methods of your own; they are imported first."


def with_places(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The values with the paths in `imports` made absolute, so that they mean the same in a run's folder and its trials.

    Args:
        values: of the whole file.
        where: the file's path; its folder is where relative paths start.
    """
    names = values.get("imports")
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return values
    return values | {"imports": [placed(name, Path(where).parent) for name in names]}


def seen_from(names: Sequence[str], file: Path) -> list[str]:
    """The names as they stand in a file: paths, which start in the working directory, from the file's folder."""
    return [os.path.relpath(name, file.parent) if is_path(name) else name for name in names]


def load_all(names: Sequence[str]) -> list[Problem]:
    """Imports them; a problem for each that cannot be."""
    problems = []
    for i, name in enumerate(names):
        try:
            load_plugin(name)
        except RankfoldError as error:
            problems.append(Problem(("imports", i), str(error).removeprefix("imports: ")))
    return problems
