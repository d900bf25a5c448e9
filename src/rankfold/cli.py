"""The command line: the list of commands, which of them runs, and how an error is shown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from rankfold import __version__
from rankfold.commands import quiet
from rankfold.commands.command import add_options, parse
from rankfold.errors import RankfoldError

#: In the order of the help; each is a module of `rankfold.commands`.
COMMANDS = (
    "train", "sparsify", "continual", "compare", "validate", "init", "methods", "optimizers", "fold", "combine", "extract", "diff", "doctor",
    "plan", "gelora", "inspect", "subspace", "docs", "version",
)  # fmt: skip

#: Packages of an extra, by the name that is imported, and what needs them.
EXTRAS = {
    **dict.fromkeys(
        (
            "pydantic",
            "yaml",
            "trl",
            "datasets",
            "matplotlib",
            "PIL",
            "sklearn",
            "scipy",
            "jinja2",
            "psutil",
            "filelock",
        ),
        "train",
    ),
    "gguf": "gguf",
    "onnx": "onnx",
    "ray": "ray",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0, or 1 for a user error, reported in one sentence on stderr. Wrong usage exits with 2.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or arguments[0] not in COMMANDS:
        _parser().parse_args(arguments)  # ends with help, version or wrong usage
        raise AssertionError("a command that argparse knows is in COMMANDS")
    command = import_module(f"rankfold.commands.{arguments[0]}")
    options = parse(_parser_of(arguments[0], command), command.Options, arguments[1:])
    if not options.debug:
        quiet.quiet()
    try:
        if options.imports:
            from rankfold.host.plugins import load_plugin

            for name in options.imports:
                load_plugin(name)
        return command.run(options)
    except KeyboardInterrupt:
        print(f"\n{getattr(command, 'INTERRUPTED', 'interrupted')}", file=sys.stderr)
        return 130
    except Exception as e:
        if options.debug or not _is_users(e):
            raise
        print(f"error: {_missing_extra(e) or e}", file=sys.stderr)
        return 1


def _is_users(error: Exception) -> bool:
    """Errors about the input or the machine, ours and the libraries'; anything else is a bug and shows its traceback."""
    if isinstance(error, RankfoldError | OSError):
        return True
    if isinstance(error, ImportError):
        # one with a name is Python's own, of a module or of something in it; without, somebody wrote it for the user
        return error.name is None or _missing_extra(error) is not None
    return type(error).__name__ in ("OutOfMemoryError", "SafetensorError")


def _missing_extra(error: Exception) -> str | None:
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    extra = EXTRAS.get(name or "")
    return f"this needs the package '{name}': pip install 'rankfold[{extra}]'" if extra else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rankfold", description="Train low-rank adapters beyond LoRA and fold them into a plain LoRA."
    )
    parser.add_argument("--version", action="version", version=f"rankfold {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name in COMMANDS:
        commands.add_parser(name, help=_about(import_module(f"rankfold.commands.{name}")))
    return parser


def _parser_of(name: str, command: ModuleType) -> argparse.ArgumentParser:
    text = _about(command)
    parser = argparse.ArgumentParser(prog=f"rankfold {name}", description=text[0].upper() + text[1:] + ".")
    add_options(parser, command.Options)
    return parser


def _about(command: ModuleType) -> str:
    return command.Options.__doc__


if __name__ == "__main__":
    sys.exit(main())
