"""`rankfold doctor`: what it prints and with which status it ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rankfold import cli


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "160")


def test_healthy_is_0(adapter, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["doctor", str(adapter()), "--engine", "vllm,sglang,llama.cpp,tgi,peft"]) == 0
    out = capsys.readouterr().out
    assert "vLLM 0.33.0" in out
    assert "healthy" in out
    assert "nothing was started" in out
    assert "folds of rankfold were run against transformers in " in out
    assert "llama.cpp 2026.10.11549 on 2026-" in out


def test_sick_is_1_and_one_can_ask_for_some_engines(adapter, capsys: pytest.CaptureFixture[str]):
    folder = str(adapter(use_rslora=True))
    assert cli.main(["doctor", folder]) == 1
    out = capsys.readouterr().out
    assert "mis-scaled" in out
    assert f"rankfold fold {folder} -o OUT" in out.replace("\n", "")
    assert cli.main(["doctor", folder, "--engine", "vllm,TGI", "--engine", "peft"]) == 0
    assert "SGLang" not in capsys.readouterr().out
    assert cli.main(["doctor", folder, "--engine", "mlx"]) == 1


def test_json(adapter, llama: Path, capsys: pytest.CaptureFixture[str]):
    folder = adapter(use_rslora=True, r=16)
    assert cli.main(["doctor", str(folder), "--json", "--base", str(llama)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["healthy"], found["file"], len(found["engines"])) == (False, [], 13)
    sglang = next(e for e in found["engines"] if e["engine"] == "sglang")
    assert (sglang["version"], sglang["status"]) == ("0.5.23", "loads but mis-scaled")
    assert (sglang["known_by"], sglang["date"], sglang["folds_run"]) == ("loader run", "2026-11", None)
    run = next(e for e in found["engines"] if e["engine"] == "llama.cpp")["folds_run"]
    assert run["error"] <= run["bound"]
    assert run["profiles"] == ["gguf"]
    assert sglang["findings"][-1]["where"].endswith("(use_rslora)") or "use_rslora" in sglang["findings"][0]["where"]


def test_no_adapter_is_one_line_and_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for path in (tmp_path, tmp_path / "nothing"):
        assert cli.main(["doctor", str(path)]) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1


def test_wrong_usage_is_2(adapter, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        cli.main(["doctor", str(adapter()), "--engine", "vlm"])
    assert exit.value.code == 2
    assert "vlm: must be of vllm, vllm-old, sglang" in capsys.readouterr().err


def test_a_narrow_terminal(adapter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("COLUMNS", "60")
    folder = adapter(use_dora=True)
    shutil.rmtree(folder / "nothing", ignore_errors=True)
    assert cli.main(["doctor", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines()) <= 60
    assert "…" not in printed  # the end of a tensor's name says which it is
