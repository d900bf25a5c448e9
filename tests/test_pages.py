"""`rankfold docs`, and the pages that messages cite."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from rankfold import cli, pages
from rankfold.errors import RankfoldError

SRC = Path(__file__).parent.parent / "src" / "rankfold"


def test_the_list_and_a_page(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["docs"]) == 0
    assert re.search(r"^methods/rasa +RaSA", capsys.readouterr().out, re.M)
    for name in ("rasa", "methods/rasa", "docs/methods/rasa.md"):
        assert cli.main(["docs", name]) == 0
        assert capsys.readouterr().out.startswith("# RaSA")


def test_a_page_for_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("rich.console.Console.pager", lambda self, **_: self)
    assert cli.main(["docs", "planning"]) == 0
    assert "Planning" in capsys.readouterr().out


def test_an_unknown_page_and_no_pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(RankfoldError, match="no page 'planing'; did you mean 'planning'"):
        pages.page("planing")
    monkeypatch.setattr(pages, "_CHECKOUT", tmp_path / "none")
    with pytest.raises(RankfoldError, match="has no documentation"):
        pages.pages()


def test_messages_cite_pages_that_exist_and_no_files():
    """A pip user has no docs folder; comments are for those who read the source."""
    for file in SRC.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "cite":
                assert pages.page(ast.literal_eval(node.args[0]))
        documentation = {
            id(owner.body[0].value)
            for owner in ast.walk(tree)
            if isinstance(owner, ast.Module) and owner.body and isinstance(owner.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
                assert not re.search(r"docs/\w+.*\.md", node.value), f"{file}:{node.lineno}"
