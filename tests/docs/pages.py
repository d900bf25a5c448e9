"""The pages for readers, and the blocks of code in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
)


class Block(NamedTuple):
    """A fenced block: its language, its text, its line, and the comment `<!-- ... -->` on the line before it."""

    language: str
    text: str
    line: int
    comment: str


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page, of these languages if any are given."""
    text = page.read_text(encoding="utf-8")
    fence = re.compile(r"^(?:<!-- (?P<comment>[^\n]*) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
    found = [
        Block(m["language"], m["text"], text.count("\n", 0, m.start("text")) + 1, m["comment"] or "")
        for m in fence.finditer(text)
    ]
    return [block for block in found if not languages or block.language in languages]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def named(page: Path) -> str:
    """A page as a test's name."""
    return page.relative_to(ROOT).as_posix()
