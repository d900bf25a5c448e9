"""`rankfold methods`."""

from __future__ import annotations

import fnmatch
import json
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points

from rankfold.catalogue import Listed, listed
from rankfold.commands.command import CommonOptions, option, positional


@dataclass(kw_only=True)
class Options(CommonOptions):
    """list the methods"""

    pattern: str = positional("a name with wildcards, such as 'ra*'", default="*", nargs="?")
    json: bool = option("print JSON instead of the table", default=False)


def run(options: Options) -> int:
    found = [row for row in _rows(options.imports) if fnmatch.fnmatchcase(row.name, options.pattern)]
    if options.json:
        keys = ("name", "title", "paper", "summary", "foldable", "config")
        print(json.dumps([{key: getattr(row, key) for key in keys} for row in found], indent=2))
    elif found:
        from rich.table import Table

        from rankfold.text import terminal

        table = Table("name", "method", "paper", "folds", "summary", box=None, pad_edge=False, header_style="bold")
        for row in found:
            table.add_row(row.name, row.title, row.paper, "exactly" if row.foldable else "no", row.summary)
        terminal().print(table)
    if not found:
        print(f"error: no method matches '{options.pattern}'; `rankfold methods` lists them all", file=sys.stderr)
    return 0 if found else 1


def _rows(imports: list[str]) -> list[Listed]:
    """Ours from their source; with third parties' methods, the whole registry, which has to load them."""
    if not imports and not entry_points(group="rankfold.methods"):
        return listed()
    from rankfold.host import registry

    return [
        Listed(m.name, m.title, m.paper, m.summary, m.foldable, m.config.__name__, m.config.__module__)
        for m in registry.find()
    ]
