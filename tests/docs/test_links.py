"""Links of every page lead somewhere, anchors too, and the site's navigation knows every page."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml
from pages import PAGES, ROOT, named, prose

MADE_ON_THE_SITE = {"changelog.md", "contributing.md"}


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links, by the rule of mkdocs and of GitHub."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        found.add(re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", words, flags=re.ASCII).strip().lower()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links(page: Path) -> None:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = Path(os.path.normpath(page.parent / path)) if path else page
        if not found.exists() or (anchor and found.suffix == ".md" and anchor not in anchors(found)):
            wrong.append(target)
    assert not wrong, f"links of {named(page)} that lead nowhere"


def test_the_navigation_knows_every_page() -> None:
    from generate.site_hooks import expanded
    from generate.site_hooks import named as in_nav

    docs = ROOT / "docs"
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = sorted(p.relative_to(docs).as_posix() for p in docs.rglob("*.md"))
    entries = list(in_nav(expanded(nav, docs, pages, set(in_nav(nav)))))
    assert sorted(entries) == sorted([*pages, *MADE_ON_THE_SITE])
