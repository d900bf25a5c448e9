"""combine, extract and diff on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rankfold.algebra import combine, extract
from rankfold.cli import main

Make = Callable[..., Path]


def test_combine(adapter: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, out = adapter("rasa"), adapter("peft lora"), tmp_path / "out"
    assert main(["combine", str(a), str(b), "--weights", "0.5", "-1", "-o", str(out), "--rank", "6"]) == 0
    shown = capsys.readouterr().out
    assert "folded 0.5·rasa − 1·peft:lora into a plain LoRA: rank 8 (6 needed), 14 modules" in shown
    combine([a, b], tmp_path / "same", weights=[0.5, -1], rank=6)
    one, other = (load_file(f / "adapter_model.safetensors") for f in (out, tmp_path / "same"))
    assert all((one[k] == other[k]).all() for k in one)
    assert main(["combine", str(a), str(b), "--weights", "0.5", "-o", str(tmp_path / "no")]) == 1
    assert "give one weight per adapter" in capsys.readouterr().err


def test_extract_and_diff(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other, out = str(bases["llama"]), str(bases["other"]), str(tmp_path / "out")
    assert main(["extract", one, other, "-o", out, "--rank", "8"]) == 0
    shown = capsys.readouterr().out
    assert "folded a full fine-tune into a plain LoRA: rank 8 (8 needed), 14 modules" in shown
    assert "note: left out, " in shown
    extract(one, other, tmp_path / "wide", rank=16)
    assert main(["diff", out, str(tmp_path / "wide"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["whole"]["relative"] < 1
    assert main(["diff", one, other]) == 0
    assert "model.embed_tokens.weight" in capsys.readouterr().out
