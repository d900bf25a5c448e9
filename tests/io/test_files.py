"""Files whole or not at all, JSON that is valid, lines that survive a kill."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from rankfold.errors import RankfoldError
from rankfold.io.files import append_line, read_json_lines, sha256, to_json, whole_file, whole_folder, write_whole


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, "old ü\n")
    with pytest.raises(OSError, match="full"), whole_file(path) as partial:
        _fill(partial)
    assert path.read_text(encoding="utf-8") == "old ü\n"
    write_whole(path, "new\n")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "new\n"


def _fill(path: Path) -> None:
    path.write_text("half")
    raise OSError("full")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
def test_modes_are_those_of_other_files(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    write_whole(tmp_path / "whole", "x")
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "inside").touch(mode=0o600)
    assert (tmp_path / "whole").stat().st_mode == plain.stat().st_mode
    assert (tmp_path / "folder" / "inside").stat().st_mode == plain.stat().st_mode


def test_a_link_s_target_keeps_its_mode(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    mode = secret.stat().st_mode
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "link").symlink_to(secret)
    assert secret.stat().st_mode == mode


@pytest.mark.parametrize("value", [math.nan, math.inf, {"a": [-math.inf]}])
def test_what_json_has_not_is_refused(value: object) -> None:
    with pytest.raises(RankfoldError, match="NaN or infinity"):
        to_json(value)


def test_json_ends_its_line() -> None:
    assert to_json({"a": 1}, indent=None) == '{"a": 1}\n'
    assert json.loads(to_json({"a": [1.5, None]})) == {"a": [1.5, None]}


def test_lines_and_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert read_json_lines(path) == []
    append_line(path, '{"a": "\u2028"}')  # str.splitlines() would split here
    append_line(path, '{"a": 2}')
    whole = [(1, {"a": "\u2028"}), (2, {"a": 2})]
    assert read_json_lines(path) == whole
    with path.open("a") as file:
        file.write('\n{"a": ')
    assert read_json_lines(path) == whole
    append_line(path, '{"a": 3}')
    assert read_json_lines(path) == [*whole, (4, {"a": 3})]
    path.write_bytes(b'{"a": 1}\n\xff\n{"a": 2}\n')
    with pytest.raises(RankfoldError, match=r"lines\.jsonl:2: not a JSON line"):
        read_json_lines(path)
    assert read_json_lines(path, skip_damaged=True) == [(1, {"a": 1}), (3, {"a": 2})]


def test_a_whole_last_line_without_its_break_stays(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}')
    assert [row for _, row in read_json_lines(path)] == [{"a": 1}, {"a": 2}]
    append_line(path, '{"a": 3}')
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n{"a": 3}\n'


def test_half_a_first_line_goes(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a"')
    append_line(path, "1")
    assert path.read_text() == "1\n"


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
