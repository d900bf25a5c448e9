"""Read a run file: its text, its short forms, `key=value` overrides, and everything that is wrong with it at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from rankfold.errors import RankfoldError, short
from rankfold.runfile.checks import check
from rankfold.runfile.imports import load_all, with_places
from rankfold.runfile.paths import expand_all
from rankfold.runfile.problems import COMMAND_LINE, Problem, RunFileError, explain
from rankfold.runfile.schema import RunFile
from rankfold.runfile.yaml import KeyPath, YamlError, read


def load(path: str | Path, overrides: Iterable[str] = ()) -> RunFile:
    """Read a run file and apply `key=value` overrides (dotted keys, values as in YAML).

    Raises:
        RunFileError: one line for each problem, with its line number.
        OSError: the file cannot be read.
    """
    values, lines = read_values(Path(path), f"no run file '{path}': `rankfold init {path}` writes one")
    check_command(values, "train", path)
    return parse(values, overrides, where=str(path), lines=lines)


def command_of(values: Any) -> str | None:
    """The command that reads a file with these keys; None where they do not tell."""
    keys = values if isinstance(values, dict) else {}
    known = {"methods": "compare", "tasks": "continual", "split": "continual", "method": "train"}
    return next((command for key, command in known.items() if key in keys), None)


def check_command(values: Any, command: str, path: str | Path) -> None:
    """Raises RunFileError for a file that another command reads: half of its keys would be unknown."""
    other = command_of(values)
    if other not in (None, command):
        raise RunFileError(
            [Problem((), f"is a file for `rankfold {other}`, and `rankfold {command}` cannot read it")], str(path)
        )


def read_values(path: Path, absent: str) -> tuple[Any, dict[KeyPath, int]]:
    """The plain values of a YAML file, and the line of every key path in it.

    Raises:
        RunFileError: it is not YAML. FileNotFoundError: it is `absent`, in words. OSError: it cannot be read.
    """
    if path.is_dir():
        there = sorted(file.name for file in path.glob("*.yaml"))
        hint = f"name the file in it: {path / there[0]}" if there else "name a file"
        raise RunFileError([Problem((), f"is a folder; {hint}")], str(path))
    try:
        return read(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(absent) from None
    except UnicodeDecodeError as e:
        raise RunFileError([Problem((), f"not UTF-8 text ({e})")], str(path)) from e
    except YamlError as e:
        raise RunFileError([Problem((), str(e))], str(path), {(): e.line}) from e


def parse(
    values: Any, overrides: Iterable[str] = (), where: str = "run file", lines: dict[KeyPath, int] | None = None
) -> RunFile:
    """Check plain values as `load` does. `where` and `lines` place the problems.

    Raises:
        RunFileError: one line for each problem.
    """
    lines = dict(lines or {})
    values = with_places(overridden(values, RunFile, overrides, where, lines), where)
    try:
        run = RunFile.model_validate(values)
    except ValidationError as e:
        raise RunFileError(explain(e, RunFile), where, lines) from None
    if problems := load_all(run.imports) or check(run):
        raise RunFileError(problems, where, lines)
    return run


def overridden(
    values: Any, root: type[BaseModel], overrides: Iterable[str], where: str, lines: dict[KeyPath, int]
) -> dict[str, Any]:
    """Plain values with short forms and paths expanded and overrides applied, which `lines` learns of.

    Raises:
        RunFileError: they are not a mapping, nor is an override, or a path names a variable that is not set.
    """
    if not isinstance(values, dict):
        keys = ", ".join(root.model_fields)
        raise RunFileError([Problem((), f"must be a mapping with the keys {keys}, got {short(values)}")], where, lines)
    values = expand_short_forms(values)
    for override in overrides:
        apply(override, values, lines)
    problems: list[Problem] = []
    values = expand_all(values, problems)
    if problems:
        raise RunFileError(problems, where, lines)
    return values


# --- short forms and overrides ------------------------------------------------------------------------------------------

_SHORT_FORMS = {"model": "name", "data": "source", "method": "name"}


def expand_short_forms(values: dict[str, Any]) -> dict[str, Any]:
    """`model: NAME` is `model: {name: NAME}`, and so on, one level deep and without touching the caller's dictionary."""
    # A section with every key commented out is null to YAML.
    values = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items() if v is not None}
    for section, key in _SHORT_FORMS.items():
        if isinstance(values.get(section), str):
            values[section] = {key: values[section]}
    return values


def apply(override: str, values: dict[str, Any], lines: dict[KeyPath, int]) -> None:
    """Set what `key=value` says, in the values and in the lines that place their problems.

    Raises:
        RunFileError: it is not `key=value`, or the key goes through something that is not a section.
    """
    key, equals, text = override.partition("=")
    path = tuple(key.split("."))
    try:
        if not equals or not key:
            raise RankfoldError(f"override '{override}' must look like training.seed=1")
        value, _ = read(text)
        if len(path) == 1 and path[0] in _SHORT_FORMS and isinstance(value, str):
            value = {_SHORT_FORMS[path[0]]: value}
        at = values
        for i, part in enumerate(path[:-1]):
            if not isinstance(below := at.get(part, {}), dict):
                raise RankfoldError(f"'{'.'.join(path[: i + 1])}' holds {short(below)}, not a section")
            at[part] = dict(below)
            at = at[part]
    except ValueError as e:
        raise RunFileError([Problem(path if equals else (), str(e))], "command line") from e
    at[path[-1]] = value
    for replaced in [known for known in lines if known[: len(path)] == path]:
        del lines[replaced]
    lines[path] = COMMAND_LINE
