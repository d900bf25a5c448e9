"""The sparsifying schedule on a tiny model: stages that continue, a curve, and a killed schedule that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import sentiment, write_jsonl

from rankfold.io.models import ModelError
from rankfold.runfile.load import parse
from rankfold.runfile.problems import RunFileError
from rankfold.runfile.schema import RunFile
from rankfold.tasks.rows import DataError
from rankfold.train import sparsify as module
from rankfold.train.folder import FolderError
from rankfold.train.run import train
from rankfold.train.sparsify import sparsify, thresholds

Values = dict[str, Any]


def sora(values: Values, *overrides: str) -> RunFile:
    method = {"name": "sora", "r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
    return parse(values | {"method": method}, ["training.learning_rate=1e-2", *overrides])


def silent(sentence: str) -> None:
    pass


def test_every_stage_goes_on_where_the_last_one_ended(classification: Values):
    run = sora(classification)
    stages = sparsify(run, thresholds(0.0, 0.1, 3), say=silent)
    assert [s.threshold for s in stages] == [0.0, 0.05, 0.1]
    assert stages[0].rank == stages[0].of == 16
    assert stages[0].nonzero == 16 * 32
    assert stages[0].rank > stages[1].rank > stages[2].rank  # 8 steps of 0.05, then 8 of 0.1, from N(0, 1)
    output = Path(run.output)
    lines = [json.loads(line) for line in (output / "stages.jsonl").read_text().splitlines()]
    assert [line["nonzero"] for line in lines] == [s.nonzero for s in stages]
    assert {"loss", "accuracy"} <= stages[1].train.keys() & stages[1].validation.keys()
    assert (output / "stages.png").stat().st_size > 5000
    assert (output / "stages.svg").stat().st_size > 5000
    logged = (output / "stage-0" / "metrics.jsonl").read_text()
    assert logged.count("eval_accuracy") == 4  # the curve's measurements are no evaluations of the run


def test_a_killed_schedule_goes_on(classification: Values, monkeypatch: pytest.MonkeyPatch):
    run, whole = sora(classification), sora(classification, f"output={classification['output']}-whole")
    calls = []

    def dies(stage: RunFile, **kwargs: Any):
        calls.append(stage.output)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(stage, **kwargs)

    monkeypatch.setattr(module, "train", dies)
    with pytest.raises(KeyboardInterrupt):
        sparsify(run, [0.0, 0.1], say=silent)
    sparsify(run, [0.0, 0.1], resume=True, say=silent)
    assert [Path(c).name for c in calls] == ["stage-0", "stage-1", "stage-1"]
    sparsify(whole, [0.0, 0.1], say=silent)
    one, two = (load_file(Path(r.output, "stage-1/adapter/adapter_model.safetensors")) for r in (run, whole))
    assert all(torch.equal(one[k], two[k]) for k in one)
    with pytest.raises(
        FolderError, match=r"stage-1' is done, and was trained otherwise: training\.epochs was 2\.0, is 1\.0"
    ):
        sparsify(run, [0.0, 0.1, 0.2], stage_epochs=1.0, resume=True, say=silent)
    write_jsonl(Path(classification["data"]["source"], "train.jsonl"), sentiment(32, 1000))
    with pytest.raises(FolderError, match=r"has other train rows than when the work in .*stage-0' began"):
        sparsify(run, [0.0, 0.1, 0.2], resume=True, say=silent)


def test_start_from_needs_the_same_shapes(classification: Values, tmp_path: Path):
    run = sora(classification)
    train(run, say=silent)
    other = [f"output={tmp_path / 'two'}", f"training.start_from={run.output}/adapter"]
    with pytest.raises(ModelError, match="other modules or shapes"):
        train(sora(classification, *other, "method.r=2"), say=silent)
    rasa = {"method": {"name": "rasa", "r": 4, "target_modules": ["query", "value"]}}
    with pytest.raises(ModelError, match="is RANKFOLD_SORA, this run is RANKFOLD_RASA"):
        train(parse(classification | rasa, other), say=silent)
    with pytest.raises(ModelError, match="not an adapter folder"):
        train(sora(classification, other[0], f"training.start_from={tmp_path}"), say=silent)
    assert not (tmp_path / "two").exists()


def test_what_has_no_threshold_or_order(classification: Values):
    with pytest.raises(RunFileError, match="no threshold"):
        sparsify(parse(classification), [0.0, 0.1], say=silent)
    with pytest.raises(ValueError, match="must increase"):
        sparsify(sora(classification), [0.1, 0.0], say=silent)


def test_methods_with_a_schedule_keep_the_last_checkpoint(classification: Values):
    assert not sora(classification).keeps_best
    assert sora(classification, "training.keep_best=true").keeps_best
    assert parse(classification).keeps_best
    with pytest.raises(RunFileError, match="early_stopping"):
        sora(classification, "training.early_stopping=2")


def test_validation_rows_are_asked_for_before_anything_is_trained(classification: Values):
    source = Path(classification["data"]["source"], "train.jsonl")
    run = sora(classification, f"data={source}")
    with pytest.raises(DataError, match=r"sparsify needs validation rows .* data\.validation: 0\.1"):
        sparsify(run, thresholds(0.0, 0.1, 2), say=silent)
    assert not Path(run.output).exists()
