"""What is wrong with tasks in a row, in one sentence each, before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import write_jsonl

from rankfold.continual.file import parse
from rankfold.continual.run import continual
from rankfold.continual.task_list import measured_rows, resolve
from rankfold.io.models import ModelError
from rankfold.runfile.problems import RunFileError
from rankfold.tasks.rows import DataError

Values = dict[str, Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": None}, r"give tasks \(a list of rows\) or split \(classes in parts\)"),
        ({"tasks": ["a", "b"]}, "split: give one of the two"),
        ({"split": {"parts": 1}}, r"split\.parts: 1 is not allowed, should be greater than 1"),
        ({"split": {"parts": 2, "sed": 1}}, r"split\.sed: unknown key .*did you mean 'seed'"),
        ({"split": None, "tasks": ["a"]}, "tasks: .*is not"),
        ({"split": None, "tasks": [{"sorce": "a"}, "b"]}, r"tasks\.0\.sorce: unknown key .*did you mean 'source'"),
        ({"split": None, "tasks": [{"labels": ["a"]}, "b"]}, r"tasks\.0\.labels: .*name them in data\.labels"),
        ({"split": None, "tasks": [{"max_train": 1}, {"packing": True}]}, r"tasks\.1\.packing: means nothing for classification"),
        ({"next_task": "frozen"}, "next_task: 'frozen' is not .*'own', 'continue', 'fresh'"),
        ({"next_task": "own", "method": "lora"}, r"next_task: 'lora' has no rule of its own \(sd_lora has one\); use continue or"),
        ({"method": "cola"}, r"next_task: continue starts from an adapter of the shapes that 'cola' begins with, and it grows; use fresh"),
        ({"task": "token-classification"}, "task: token-classification: tasks in a row need classes of their own"),
        ({"task": "causal-lm"}, "split: causal-lm has no classes to split; list the rows"),
        ({"training": {"start_from": "x"}}, r"training\.start_from: every task starts from the one before"),
        ({"training": {"extra": {"label_smoothing_factor": 0.1}}}, r"training\.extra: label_smoothing_factor .*loss_over: all"),
        ({"training": {"epochs": 0}}, r"training\.epochs: 0 is not allowed"),
    ],
)  # fmt: skip
def test_the_file(values: Values, change: Values, message: str):
    with pytest.raises(RunFileError, match=message):
        parse(values | change)


def test_lists_of_rows_need_a_source(values: Values):
    with pytest.raises(RunFileError, match=r"tasks\.0: needs source"):
        parse(values | {"split": None, "data": {}, "tasks": [{"max_train": 3}, {"train": "b.jsonl"}]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": {"parts": 5}}, r"split\.parts: 5 is more than the 4 classes of data \(even, neg, odd, pos\); give at most 4"),
        ({"split": {"parts": 4}}, r"loss_over: task 1 has the single class 'even', .* use loss_over: all"),
        ({"split": {"parts": 3}}, r"loss_over: task 2 has the single class 'odd', .* use loss_over: seen"),
        (
            {"split": None, "tasks": [{"classes": ["pos", "neg"]}, {"classes": ["even", "pos"]}]},
            r"tasks\.1: the class 'pos' is in task 1 and task 2, and a class belongs to one task",
        ),
        (
            {"split": None, "tasks": [{"classes": ["pos", "neg"]}, {"classes": ["even", "od"]}]},
            r"task 2: data\.classes: no row of train has the class 'od'; did you mean 'odd'",
        ),
    ],
)  # fmt: skip
def test_the_classes(values: Values, change: Values, message: str):
    with pytest.raises(DataError, match=message):
        resolve(parse(values | change))


def test_fresh_adapters_want_wide_weights_from_the_start(values: Values):
    file = parse(values | {"next_task": "fresh"}, ["model.dtype=bfloat16"])
    with pytest.raises(
        ModelError, match=r"next_task: fresh: small updates are rounded away in weights of torch\.bfloat16; set"
    ):
        continual(file, say=lambda sentence: None)
    assert not Path(file.output).exists()


def test_the_copy_of_the_file_means_the_same(values: Values):
    file = parse(values | {"split": None, "tasks": [{"classes": ["a"]}, {"max_train": 3, "source": "b"}]})
    again = parse(yaml.safe_load(file.to_yaml()))
    assert again.model_dump() == file.model_dump()
    assert [again.data_of(i).model_dump() for i in (0, 1)] == [file.data_of(i).model_dump() for i in (0, 1)]


def test_parts_follow_the_seed(values: Values):
    def classes(seed: int | None) -> list[tuple[str, ...]]:
        return [task.classes for task in resolve(parse(values | {"split": {"parts": 2, "seed": seed}}))]

    assert classes(None) == [("even", "neg"), ("odd", "pos")]
    assert classes(1) == classes(1) != classes(None)
    assert sorted(c for part in classes(1) for c in part) == ["even", "neg", "odd", "pos"]
    three = resolve(parse(values | {"split": {"parts": 3}, "loss_over": "all"}))
    assert [task.classes for task in three] == [("even", "neg"), ("odd",), ("pos",)]


def test_a_task_without_rows_to_measure(values: Values, reviews: Path, tmp_path: Path):
    some = [json.loads(line) for line in (reviews / "test.jsonl").read_text().splitlines()]
    test = write_jsonl(
        tmp_path / "test.jsonl", [row for row in some if row["label"] != "pos" and row["label"] != "odd"]
    )
    file = parse(values | {"data": {"train": str(reviews / "train.jsonl"), "test": str(test)}})
    with pytest.raises(DataError, match=r"task 2: test has no row of data\.classes \(odd, pos\); it has: even, neg"):
        measured_rows(file, resolve(file))
    file = parse(values | {"data": {"train": str(reviews / "train.jsonl")}})
    with pytest.raises(DataError, match=r"task 1 has neither test nor validation rows; name some in data\.test"):
        continual(file)
    assert not Path(values["output"]).exists()
