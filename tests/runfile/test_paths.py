"""`~` and environment variables in the paths of run files, compare files and command lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankfold.cli import main
from rankfold.compare.file import parse as parse_comparison
from rankfold.runfile.load import parse
from rankfold.runfile.problems import RunFileError

RUN = {
    "model": "~/models/m",
    "task": "classification",
    "data": {"source": "$ROWS/f", "train": "~/train.csv", "validation": "${ROWS}/v.csv", "test": 0.1},
    "method": {"name": "rasa", "target_modules": ".*query$|.*key$"},
    "training": {"start_from": "~/adapter"},
    "output": "~/x",
}


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ROWS", "/rows")


def test_every_path_of_a_run(tmp_path: Path):
    run = parse(RUN)
    assert (run.model.name, run.output) == (f"{tmp_path}/models/m", f"{tmp_path}/x")
    d = run.data
    assert (d.source, d.train, d.validation, d.test) == ("/rows/f", f"{tmp_path}/train.csv", "/rows/v.csv", 0.1)
    assert run.training.start_from == f"{tmp_path}/adapter"
    assert run.method.fields["target_modules"] == ".*query$|.*key$"
    assert parse(RUN, ["output=$ROWS/out"]).output == "/rows/out"


def test_every_path_of_a_comparison(tmp_path: Path):
    values = {k: RUN[k] for k in ("model", "task", "output")} | {
        "data": {"source": "~/f.csv"},
        "methods": ["lora", "rasa"],
    }
    file = parse_comparison(values | {"rates": [1e-3], "seeds": [0, 1], "budget": "none"}, where="c.yaml")
    assert (file.output, file.data.source) == (f"{tmp_path}/x", f"{tmp_path}/f.csv")


def test_the_path_of_a_method(tmp_path: Path):
    with pytest.raises(RunFileError, match=f"basis='{tmp_path}/b.safetensors'"):
        parse(RUN | {"method": {"name": "cora", "basis": "~/b.safetensors"}})


def test_a_variable_that_is_not_set_is_named():
    with pytest.raises(
        RunFileError, match=r"data\.source: '\$NOWHERE/f' names the environment variable NOWHERE, which"
    ):
        parse(RUN, ["data.source=$NOWHERE/f"])


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["init", "~/run.yaml"]) == 0
    assert (tmp_path / "run.yaml").is_file()
    assert main(["validate", "~/run.yaml"]) == 0
    assert main(["fold", "~/none", "--out=~/folded"]) == 1
    assert f"{tmp_path}/none" in capsys.readouterr().err
