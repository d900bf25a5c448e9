"""Which values of a run file or a compare file are paths, so that `~` and `$NAME` mean there what they mean to a shell."""

from __future__ import annotations

from typing import Any

from rankfold.errors import RankfoldError
from rankfold.io.paths import expand
from rankfold.runfile.problems import Problem
from rankfold.runfile.yaml import KeyPath

PATHS = {
    ("output",), ("model", "name"), ("data", "source"), ("data", "train"), ("data", "validation"), ("data", "test"),
    ("training", "start_from"), ("imports",), ("model", "adapters"),
    ("tasks", "source"), ("tasks", "train"), ("tasks", "validation"), ("tasks", "test"),
}  # fmt: skip
"""The keys whose text may be a path."""
METHODS = ("method", "methods", "budget")
"""Sections whose keys the methods decide: a text that begins like a path is one."""


def expand_all(values: Any, problems: list[Problem], at: KeyPath = ()) -> Any:
    """The values of a file with every path in them expanded; `problems` learns of those that cannot be."""
    if isinstance(values, dict):
        return {key: expand_all(value, problems, (*at, key)) for key, value in values.items()}
    if isinstance(values, list):
        return [expand_all(value, problems, (*at, i)) for i, value in enumerate(values)]
    if not isinstance(values, str) or not at:
        return values
    keys = tuple(part for part in at if isinstance(part, str))
    if keys in PATHS or (keys[0] in METHODS and values[:1] in ("~", "$")):
        try:
            return expand(values)
        except RankfoldError as e:
            problems.append(Problem(at, str(e)))
    return values
