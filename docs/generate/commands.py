"""Every command with its arguments, from the dataclasses that make the parsers."""

from __future__ import annotations

import argparse
from dataclasses import fields
from importlib import import_module

from generate.markdown import code, fence, page, table
from rankfold.cli import COMMANDS
from rankfold.commands.command import CommonOptions, add_options


def commands() -> str:
    common = {f.name for f in fields(CommonOptions)}
    parts = []
    for name in COMMANDS:
        options = import_module(f"rankfold.commands.{name}").Options
        parts += [
            f"## rankfold {name}",
            _capital(options.__doc__) + ".",
            fence(usage(name)),
            _arguments(options, common),
        ]
    return page(
        "Commands",
        "the options of src/rankfold/commands/",
        "`rankfold COMMAND --help` prints the same. Flags and arguments may come in any order.",
        "| exit status | when |\n| --- | --- |\n| 0 | done |\n| 1 | a user error, in one sentence on stderr; `doctor`: not healthy |\n| 2 | wrong usage |\n"
        "| 130 | interrupted |",
        "Every command has:",
        table(("argument", "meaning"), _rows(CommonOptions, set())),
        "Any other error is a bug and shows its traceback; `--debug` shows the traceback of a user error too.",
        *parts,
    )


def parser(name: str) -> argparse.ArgumentParser:
    """The parser of a command."""
    made = argparse.ArgumentParser(prog=f"rankfold {name}")
    add_options(made, import_module(f"rankfold.commands.{name}").Options)
    return made


def usage(name: str) -> str:
    """`rankfold NAME` with its positional arguments and required flags."""
    words = [f"rankfold {name}"]
    for action in parser(name)._actions:
        shown = action.metavar or action.dest
        if action.option_strings:
            words += [f"{action.option_strings[0]} {action.metavar or action.dest.upper()}"] if action.required else []
        else:
            words.append(
                f"[{shown} ...]" if action.nargs == "*" else f"[{shown}]" if action.nargs == "?" else str(shown)
            )
    return " ".join([*words, "[flags]"])


def _arguments(options: type, without: set[str]) -> str:
    rows = _rows(options, without)
    return table(("argument", "meaning"), rows) if rows else ""


def _rows(options: type, without: set[str]) -> list[tuple[str, str]]:
    made = argparse.ArgumentParser(add_help=False)
    add_options(made, options)
    return [(_flags(a), _meaning(a)) for a in made._actions if a.dest not in without]


def _flags(action: argparse.Action) -> str:
    if not action.option_strings:
        return code(action.metavar or action.dest)
    value = (
        ""
        if action.nargs == 0
        else f" {action.metavar or '{' + ','.join(map(str, action.choices)) + '}' if action.choices else action.metavar or action.dest.upper()}"
    )
    return ", ".join(code(flag + value) for flag in action.option_strings)


def _meaning(action: argparse.Action) -> str:
    said = action.help or ""
    return said if said.partition(":")[0] in (action.choices or ()) else _capital(said)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
