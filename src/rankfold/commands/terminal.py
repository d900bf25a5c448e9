"""Output that several commands share: a table of names and values, and the command line itself."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence


def print_table(title: str, lines: Sequence[tuple[str, str]]) -> None:
    """One line per name and value."""
    from rich.table import Table

    from rankfold.text import terminal

    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for name, value in lines:
        table.add_row(name, value)
    terminal().print(table, soft_wrap=False)


def command_line() -> str:
    """The command that is running, as a shell would take it."""
    return shlex.join(["rankfold", *sys.argv[1:]])
