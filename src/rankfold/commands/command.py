"""Turns a dataclass of options into an argument parser, as the configs of methods describe their own fields.

The type of a field says how it is parsed: `bool` is a switch, `Literal` a choice, `int` and `float` are converted, `X | None` is X.
What is not given keeps the default of the dataclass, which the help states.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rankfold.io.paths import with_home


def option(help: str, *, default: Any = MISSING, short: str | None = None, **argparse_: Any) -> Any:
    """A field that is a flag, `--like-its-name`; required unless it has a default.

    Args:
        short: a second, short flag.
        argparse_: more of `add_argument`'s, where the type does not say it; also `either`: fields of the same value
            exclude each other.
    """
    default = {"default_factory": list} if default == [] else {"default": default}
    return field(**default, metadata={"help": help, "short": short, **argparse_})


def positional(help: str, *, default: Any = MISSING, **argparse_: Any) -> Any:
    """A field given by position."""
    return option(help, default=default, positional=True, **argparse_)


def group(title: str, description: str, options: type) -> Any:
    """A field that holds, by name, what was given of another command's options; the parser shows them under a title."""
    return field(default_factory=dict, metadata={"group": options, "title": title, "description": description})


def names(text: str) -> list[str]:
    """What a list is on the command line: `query,key,value`."""
    return [name.strip() for name in text.split(",") if name.strip()]


@dataclass(kw_only=True)
class CommonOptions:
    """Of every command."""

    debug: bool = option("show the traceback of an error", default=False)
    imports: list[str] = option(
        "a module or file (./my_method.py) that registers a method of yours (repeatable)",
        default=[],
        flag="import",
        action="append",
        metavar="MODULE",
    )


@dataclass(kw_only=True)
class RunFileOptions(CommonOptions):
    """Of the commands that read a run file."""

    run_file: str = positional("the run file", metavar="run.yaml")
    overrides: list[str] = positional("for instance training.seed=1", default=[], nargs="*", metavar="key=value")


Options = TypeVar("Options", bound=CommonOptions)


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """Adds an argument per field."""
    either: dict[str, Any] = {}
    hints = get_type_hints(options)
    for f in fields(options):
        if "group" in f.metadata:
            part = parser.add_argument_group(f.metadata["title"], f.metadata["description"])
            inner = get_type_hints(f.metadata["group"])
            for g in fields(f.metadata["group"]):
                _add(part, g, inner[g.name], required=False)
            continue
        to = parser
        if (name := f.metadata.get("either")) is not None:
            to = either[name] = either.get(name) or parser.add_mutually_exclusive_group()
        _add(to, f, hints[f.name])


def parse(parser: argparse.ArgumentParser, options: type[Options], arguments: Sequence[str]) -> Options:
    """The options that were given. Flags may stand anywhere between the other arguments."""
    given = {name: with_home(value) for name, value in vars(parser.parse_intermixed_args(arguments)).items()}
    for f in fields(options):
        if "group" in f.metadata:
            given[f.name] = {g.name: given.pop(g.name) for g in fields(f.metadata["group"]) if g.name in given}
    return options(**given)


def _add(to: argparse._ActionsContainer, f: Field[Any], hint: Any, required: bool | None = None) -> None:
    about = {k: v for k, v in f.metadata.items() if k not in ("either", "positional", "short")}
    about = {"default": argparse.SUPPRESS, **_of_type(hint), **about, "help": _help(f)}
    if f.metadata.get("positional"):
        to.add_argument(f.name, **about)
        return
    if required is None:
        required = f.default is MISSING and f.default_factory is MISSING
    flag = "--" + about.pop("flag", f.name).replace("_", "-")
    short = f.metadata.get("short")
    to.add_argument(*([short] if short else []), flag, dest=f.name, required=required, **about)


def _help(f: Field[Any]) -> str:
    unsaid = any(f.default is nothing for nothing in (MISSING, None, False))
    return f.metadata["help"] + ("" if unsaid else f" (default: {f.default})")


def _of_type(hint: Any) -> dict[str, Any]:
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (h for h in get_args(hint) if h is not NoneType)
    if hint is bool:
        return {"action": "store_true"}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    return {"type": hint} if hint in (int, float) else {}
