"""What is wrong with a run file, in words: place, path, value, what is allowed and the nearest valid name."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ValidationError

from rankfold.errors import RankfoldError, nearest, short
from rankfold.runfile.yaml import KeyPath

COMMAND_LINE = 0
"""Stands for a line number where a value came from a `key=value` override."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and the path of the field where."""

    path: KeyPath
    message: str


class RunFileError(RankfoldError):
    """The run file cannot be used. The message has one line per problem."""

    def __init__(self, problems: Sequence[Problem], where: str = "run file", lines: dict[KeyPath, int] | None = None):
        self.problems = list(problems)
        placed = sorted(((_line(p, lines or {}), p) for p in problems), key=lambda pair: pair[0] or 0)
        super().__init__("\n".join(_in_words(p, where, line) for line, p in placed))


def _line(problem: Problem, lines: dict[KeyPath, int]) -> int | None:
    at = problem.path
    while at and at not in lines:
        at = at[:-1]  # a missing key is reported where its section begins
    return lines.get(at)


def _in_words(problem: Problem, where: str, line: int | None) -> str:
    place = where if line is None else "command line" if line == COMMAND_LINE else f"{where}:{line}"
    name = ".".join(str(part) for part in problem.path)
    return f"{place}: {name}: {problem.message}" if name else f"{place}: {problem.message}"


def explain(error: ValidationError, root: type[BaseModel]) -> list[Problem]:
    """pydantic's errors about `root` as ours: one a field (pydantic gives one a branch of a union)."""
    problems: dict[KeyPath, Problem] = {}
    for e in error.errors():
        path, annotation, section = _declared(root, e["loc"])
        kind, value = e["type"], e["input"]
        if kind == "extra_forbidden":
            message = f"unknown key (value {short(value)}){nearest(path[-1], section.model_fields if section else ())}"
        elif kind == "missing":
            description = section.model_fields[str(path[-1])].description if section else None
            message = f"required but missing: {description or ''}"
        elif kind.startswith(("greater_than", "less_than")):
            message = f"{short(value)} is not allowed, {e['msg'].removeprefix('Input ')}"
        elif kind == "value_error":
            message = str(e.get("ctx", {}).get("error", e["msg"]))
        else:
            choices = [c for c in typing.get_args(annotation) if isinstance(c, str)]
            near = difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) else []
            message = f"{short(value)} is not {allowed(str if annotation is None else annotation)}" + (
                f"; did you mean '{near[0]}'?" if near else ""
            )
        problems.setdefault(path, Problem(path, message))
    return list(problems.values())


def one_of(name: str, choices: Iterable[str]) -> str:
    """What would have been allowed instead of an unknown name, and the nearest."""
    choices = list(choices)
    near = difflib.get_close_matches(name, choices, n=1)
    listed = ("one of " if len(choices) > 1 else "") + ", ".join(f"'{choice}'" for choice in choices)
    return listed + (f"; did you mean '{near[0]}'?" if near else "")


_KINDS: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    set: "a list",
    tuple: "a list",
    dict: "a mapping",
    type(None): "null",
}


def allowed(annotation: Any) -> str:
    """A type in words: `int | Literal["epoch"]` is "a whole number or 'epoch'"."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(f"'{a}'" for a in args)
    if origin is Annotated:
        return allowed(args[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(allowed(a) for a in args))
    if origin is list and args:
        return f"a list of {allowed(args[0])}"
    kind = origin or annotation
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"a mapping with the keys {', '.join(kind.model_fields)}" if kind.model_fields else "a mapping"
    return _KINDS.get(kind, getattr(kind, "__name__", str(kind)))


def _declared(root: type[BaseModel], loc: tuple[str | int, ...]) -> tuple[KeyPath, Any, type[BaseModel] | None]:
    """The part of pydantic's location that stands in the file, without its names of union branches; its annotation; and
    the section that it is a key of."""
    section, i = root, 0
    while True:
        field = section.model_fields.get(str(loc[i]))
        i += 1
        if field is None:
            return loc[:i], None, section
        at: Any = _given(field.annotation)
        items = typing.get_args(at)[-1:] if typing.get_origin(at) in (list, dict) else ()
        if items and i < len(loc) and (_is_section(items[0]) or isinstance(loc[i], int)):
            at = items[0]  # an item of a list, or a value of a mapping
            i += 1
            if i == len(loc):
                return loc, at, None
        if i == len(loc) or not _is_section(at):
            return loc[:i], field.annotation, section
        section = at


def _given(annotation: Any) -> Any:
    """What `X | None` is where it is not null: X."""
    kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    optional = typing.get_origin(annotation) in (typing.Union, types.UnionType) and len(kinds) == 1
    return kinds[0] if optional else annotation


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
