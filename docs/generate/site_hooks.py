"""What mkdocs does not do by itself: patterns in the navigation, pages that lie outside docs/, and links to files of the repository."""

from __future__ import annotations

import fnmatch
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger("mkdocs.hooks.rankfold")

OUTSIDE = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Files of the repository's root → what they are called on the site."""
BLOB = "blob/main/"


def on_config(config: Any) -> Any:
    docs = Path(config.docs_dir)
    pages = sorted(p.relative_to(docs).as_posix() for p in docs.rglob("*.md"))
    config.nav = expanded(config.nav, docs, pages, set(named(config.nav)))
    return config


def named(nav: Any) -> Iterator[str]:
    """The pages and patterns of a navigation."""
    for entry in nav:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        if isinstance(value, list):
            yield from named(value)
        else:
            yield value


def expanded(nav: Any, docs: Path, pages: list[str], taken: set[str]) -> list[Any]:
    """The navigation with each pattern replaced by the pages that have no entry of their own; a `*` does not match `/`."""
    made: list[Any] = []
    for entry in nav:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        if isinstance(value, list):
            made.append({next(iter(entry)): expanded(value, docs, pages, taken)})
        elif "*" not in value:
            made.append(entry)
        else:
            found = [
                p for p in pages if p not in taken and fnmatch.fnmatch(p, value) and p.count("/") == value.count("/")
            ]
            taken.update(found)
            made += [{_title(docs / p): p} for p in found]
    return made


def _title(page: Path) -> str:
    """What a page is called in the navigation: its heading up to the colon."""
    heading = page.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
    return heading.partition(":")[0]


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    root = Path(config.config_file_path).parent
    for source, name in OUTSIDE.items():
        files.append(File.generated(config, name, content=(root / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Points every link to a file of the repository at its page on the site, or at the repository itself."""
    root, docs = Path(config.config_file_path).parent, Path(config.docs_dir)
    here = {name: source for source, name in OUTSIDE.items()}.get(page.file.src_uri)
    folder = root if here else (docs / page.file.src_uri).parent

    def mended(link: re.Match[str]) -> str:
        words, target, anchor = link["words"], link["target"], link["anchor"] or ""
        if re.match(r"[a-z]+:", target) or not target:
            return link[0]
        path = Path(os.path.normpath(folder / target))
        if not path.exists():
            log.warning(f"{page.file.src_uri}: {target} does not exist")
            return link[0]
        inside = path.is_relative_to(docs) and path.is_file()
        name = path.relative_to(docs).as_posix() if inside else OUTSIDE.get(path.relative_to(root).as_posix())
        if name is None:  # of the repository, not of the site
            return (
                f"[{words}]({config.repo_url}{BLOB}{path.relative_to(root).as_posix()})" if config.repo_url else words
            )
        if inside and not here:
            return link[0]
        return f"[{words}]({os.path.relpath(name, os.path.dirname(page.file.src_uri) or '.')}{anchor})"

    link = re.compile(
        r"(?<!!)\[(?P<words>[^\]\n]*(?:\[[^\]\n]*\][^\]\n]*)*)\]\((?P<target>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)"
    )
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)
    return "".join(part if part.startswith("```") else link.sub(mended, part) for part in parts)
