"""`rankfold docs`."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from rankfold.commands.command import CommonOptions, option, positional
from rankfold.pages import page, pages


@dataclass(kw_only=True)
class Options(CommonOptions):
    """list the documentation's pages, or print one"""

    page: str | None = positional("such as planning or methods/lora", default=None, nargs="?")
    raw: bool = option("print the Markdown as it is, as is done where the output is not a terminal", default=False)


def run(options: Options) -> int:
    if options.page is None:
        for name, file in pages().items():
            print(f"{name:<24} {_title(file.read_text(encoding='utf-8'))}")
        return 0
    text = page(options.page)
    if options.raw or not sys.stdout.isatty():
        print(text)
        return 0
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    with console.pager(styles=True):
        console.print(Markdown(text))
    return 0


def _title(text: str) -> str:
    found = re.search(r"^# (.+)$", text, re.M)
    return found.group(1) if found else ""
