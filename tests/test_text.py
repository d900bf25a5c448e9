"""Values for people, at the edges between units."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rankfold import text
from rankfold.commands.terminal import print_table


@pytest.mark.parametrize(
    ("n", "shown"),
    [(0, "0 B"), (999, "999 B"), (1_000, "1 kB"), (999_499, "999 kB"), (999_600, "1 MB"), (1_234_567, "1.23 MB"),
     (412_345_678, "412 MB"), (1_500_000_000, "1.5 GB"), (1_234_000_000_000, "1,234 GB")],
)  # fmt: skip
def test_size(n: int, shown: str) -> None:
    assert text.size(n) == shown


@pytest.mark.parametrize(
    ("seconds", "digits", "shown"),
    [(0, 3, "0 s"), (0.1234, 3, "0.123 s"), (89.4, 2, "89 s"), (90, 3, "1.5 min"), (5399, 2, "90 min"),
     (5400, 3, "1.5 h"), (400_000, 2, "111 h"), (123.4, 2, "2.1 min"), (3_600_000, 3, "1000 h")],
)  # fmt: skip
def test_duration(seconds: float, digits: int, shown: str) -> None:
    assert text.duration(seconds, digits) == shown


def test_count() -> None:
    assert [text.count(n) for n in (0, 999_999, 1_000_000, 2_500_000_000)] == ["0", "999,999", "1M", "2.5B"]


def test_short_number_is_short() -> None:
    for k in range(-12, 12):
        for x in (1, 1.2345, 9.996):
            assert len(text.short_number(x * 10.0**k)) <= 5


def test_changes() -> None:
    assert text.changes("a", {"b": 1, "c": {"d": 2}}, {"b": 1, "c": {"d": 3}, "e": 4}) == [
        "a.c.d was 2, is 3",
        "a.e was None, is 4",
    ]
    assert text.changes("", {"b": 1}, {"b": 2}) == ["b was 1, is 2"]
    assert text.changes("a", 1, 1) == []


def test_short_repr_and_examples() -> None:
    assert text.short_repr("x" * 100) == "'" + "x" * 56 + "..."
    assert text.examples(["a"]) == "a"
    assert text.one_line(ValueError(" a\n b")) == "a b"
    assert text.first_line(ValueError("")) == "ValueError"


def test_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    odd = [("classes", "[neg], [/INST], :x:"), ("targets", ".*[qv]_proj")]
    print_table("runs/[abc]", odd)
    shown = capsys.readouterr().out
    assert all(part in shown for pair in odd for part in pair)
    assert "runs/[abc]" in shown


def test_tables_go_to_that_terminal_alone() -> None:
    source = Path(text.__file__).parent
    makers = [file for file in source.rglob("*.py") if re.search(r"\bConsole\(", file.read_text(encoding="utf-8"))]
    assert {file.name for file in makers} == {"text.py", "docs.py"}  # the pages of docs are Markdown
