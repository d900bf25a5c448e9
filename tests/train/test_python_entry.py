"""`from rankfold.train import train`: a path, a dictionary, overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rankfold.errors import RankfoldError
from rankfold.runfile.load import parse
from rankfold.train import TrainResult, train


def test_a_dictionary_and_a_path(classification: dict[str, Any], tmp_path: Path):
    once = train(classification, "training.epochs=1", say=lambda _: None)
    assert isinstance(once, TrainResult)
    assert once.epochs == 1
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(classification))
    again = train(tmp_path / "run.yaml", "training.epochs=1", f"output={tmp_path / 'again'}", say=lambda _: None)
    assert again.after == once.after


def test_an_override_of_what_is_read_already_is_refused(classification: dict[str, Any]):
    with pytest.raises(RankfoldError, match="overrides a run file that is read already"):
        train(parse(classification), "training.seed=1")
