"""The scripts of examples/ for a newcomer run from start to end with `--tiny`."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = ("trainer", "sft", "dpo", "bare_loop", "grpo")


# Defaults of transformers where there is no accelerator, and of TRL's arguments. Naming the other value of the latter would need
# transformers 5.23.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", [name, "--tiny", "-o", str(tmp_path / "out")])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    method = "sora" if name in ("trainer", "bare_loop") else "rasa"
    assert f"folded {method} into a plain LoRA" in capsys.readouterr().out
    assert (tmp_path / "out" / "folded" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_is_short(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= (70 if name == "grpo" else 60)
