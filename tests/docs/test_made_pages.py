"""The pages that are made from the code are up to date, and the API's page names what exists."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from generate.__main__ import PAGES
from generate.memory import SHAPES, section
from pages import ROOT

import rankfold
from rankfold.host import registry

MEMORY = "reference/memory.md"


@pytest.mark.usefixtures("own_registry")
def test_pages_made_from_the_code_are_up_to_date() -> None:
    old = [
        name
        for name, make in PAGES.items()
        if name != MEMORY
        and (not (path := ROOT / "docs" / name).exists() or path.read_text(encoding="utf-8") != make())
    ]
    assert not old, "out of date: run `make reference`"


def test_the_table_of_memory_is_up_to_date() -> None:
    """By its smallest model: to count all takes ten seconds."""
    fewest = min(SHAPES, key=lambda name: SHAPES[name]["num_hidden_layers"])
    page = (ROOT / "docs" / MEMORY).read_text(encoding="utf-8")
    assert section(fewest) in page, "out of date: run `make reference`"
    assert all(f"## {name}\n" in page for name in SHAPES)


def test_the_api_page_names_what_exists_and_every_public_name() -> None:
    page = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    found = set()
    for dotted in re.findall(r"^::: (\S+)", page, re.M):
        module, _, name = dotted.rpartition(".")
        found.add(getattr(import_module(module), name))
    configs = {m.config.__name__ for m in registry.find()}
    for name in set(rankfold.__all__) - configs:
        assert getattr(rankfold, name) in found, name


def test_support_names_the_lowest_versions() -> None:
    page = (ROOT / "docs" / "reference" / "support.md").read_text(encoding="utf-8").lower().replace("pytorch", "torch")
    rows = {cells[1]: cells for line in page.splitlines() if len(cells := [c.strip() for c in line.split("|")]) == 6}
    printed = subprocess.run([sys.executable, ROOT / "tests" / "lowest.py"], capture_output=True, text=True, check=True)
    lowest = dict(line.split("==") for line in printed.stdout.split() if "==" in line)
    for name in rows.keys() & lowest.keys():
        assert rows[name][2].startswith(lowest[name]), name
        assert rows[name][4].startswith(lowest[name]) or f"**{lowest[name]} was not run**" in rows[name][4], name
    assert len(rows.keys() & lowest.keys()) > 6


def test_every_method_has_its_page_and_its_row() -> None:
    table = (ROOT / "docs" / "reference" / "methods.md").read_text(encoding="utf-8")
    for method in registry.find():
        if method.config.__module__.startswith("rankfold."):
            assert f"[`{method.name}`](../methods/{method.name}.md)" in table
            assert Path(ROOT, "docs", "methods", f"{method.name}.md").exists()


def test_the_citation_has_the_version() -> None:
    import yaml

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == rankfold.__version__
