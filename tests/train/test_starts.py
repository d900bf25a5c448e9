"""What a run checks before it trains: rows with nothing left to learn, classes of a head that it starts from, names of modules."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_jsonl
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from rankfold.io.models import ModelError
from rankfold.runfile.load import parse
from rankfold.runfile.problems import RunFileError
from rankfold.tasks.rows import DataError
from rankfold.train.prepare import make_plan, prepare
from rankfold.train.run import train

Values = dict[str, Any]


def silent(sentence: str) -> None:
    pass


@pytest.mark.parametrize("options", [[], ["data.packing=true"]])
def test_rows_with_nothing_left_to_learn_are_counted(language_model: Values, tmp_path: Path, options: list[str]):
    rows = [{"prompt": f"{i:02}" + "x" * (40 if i % 4 else 2), "completion": "y"} for i in range(12)]
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    options = [f"data={path}", "data.max_length=16", "training.max_steps=1", *options]
    plan = make_plan(prepare(parse(language_model, options)))
    assert plan.rows == {"train": 3}
    assert any("9 of 12 rows are left out" in note and "(row 2 and 8 more)" in note for note in plan.notes)
    said: list[str] = []
    result = train(parse(language_model, options), say=said.append)
    assert any("9 of 12 rows are left out" in sentence for sentence in said)
    assert ": 3 train rows" in (result.adapter_path / "README.md").read_text()

    none = [f"data={write_jsonl(tmp_path / 'none.jsonl', rows[1:4])}", *options[1:]]
    with pytest.raises(
        DataError, match=r"train: none of the 3 rows has anything to learn within 16 tokens.*longest row has 44"
    ):
        prepare(parse(language_model, none))
    assert prepare(parse(language_model, [*none, "data.max_length=64"])).encoded["train"].lengths == [44] * 3


def test_validation_rows_too(language_model: Values, tmp_path: Path):
    path = write_jsonl(tmp_path / "v.jsonl", [{"prompt": "x" * 40, "completion": "y"}] * 2)
    with pytest.raises(DataError, match="validation: none of the 2 rows"):
        prepare(parse(language_model, [f"data.validation={path}", "data.max_length=16"]))


def test_the_classes_of_a_head_are_checked(classification: Values, tmp_path: Path):
    options = ["training.epochs=null", "training.max_steps=1"]
    first = train(parse(classification, options), say=silent)
    assert json.loads((first.adapter_path / "labels.json").read_text()) == ["neg", "pos"]
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    options.append(f"output={tmp_path / 'second'}")
    for folder in (first.adapter_path, checkpoint):
        with pytest.raises(
            ModelError,
            match=r"knows the classes \['neg', 'pos'\] in this order, .*set data\.labels: \[\"neg\", \"pos\"\]",
        ):
            train(
                parse(classification, [*options, f"training.start_from={folder}", "data.labels=[pos, neg]"]), say=silent
            )
    more = [*options, f"training.start_from={first.adapter_path}"]
    assert train(parse(classification, more), say=silent).before["loss"] == pytest.approx(first.after["loss"])

    (first.adapter_path / "labels.json").unlink()
    (first.adapter_path / "README.md").unlink()  # which says them too
    said: list[str] = []
    train(parse(classification, more), overwrite=True, say=said.append)
    assert any("does not say which classes its head knows; those of this run are neg, pos" in s for s in said)


@pytest.mark.parametrize("task", ["classification", "token-classification"])
def test_the_order_of_a_pretrained_head_is_kept(task: str, classification: Values, tmp_path: Path):
    """Sorted classes would give every row of the head another class."""
    torch.manual_seed(0)
    names, folder = {0: "Pos", 1: "neg", 2: "so"}, tmp_path / "classifier"
    shutil.copytree(classification["model"], folder)
    auto = {
        "classification": AutoModelForSequenceClassification,
        "token-classification": AutoModelForTokenClassification,
    }
    auto[task].from_pretrained(folder, id2label=names, label2id={v: k for k, v in names.items()}).save_pretrained(
        folder
    )
    texts, labels = [f"{name} film" for name in ("neg", "pos", "so")] * 3, ["neg", "pos", "so"] * 3
    rows = [
        {"text": text, "label": label} if task == "classification" else {"words": text.split(), "tags": [label, label]}
        for text, label in zip(texts, labels, strict=True)
    ]
    values = classification | {
        "task": task,
        "model": str(folder),
        "data": {"source": str(write_jsonl(tmp_path / "r.jsonl", rows))},
    }
    assert prepare(parse(values)).config.id2label == {0: "pos", 1: "neg", 2: "so"}
    assert prepare(parse(values, ["data.labels=[pos, neg, so]"])).rows.notes == prepare(parse(values)).rows.notes == []
    with pytest.raises(
        ModelError,
        match=r"model.name: .*knows the classes .* in this order, this run has .*; set data.labels: \[\"pos\", \"neg\", \"so\"\]",
    ):
        prepare(parse(values, ["data.labels=[neg, pos, so]"]))

    named = {
        "source": str(write_jsonl(tmp_path / "named.jsonl", json.loads(json.dumps(rows).replace('"neg"', '"bad"'))))
    }
    (note,) = prepare(parse(values | {"data": named})).rows.notes
    assert (
        "knows the classes ['Pos', 'neg', 'so']; its head is trained on for ['bad', 'pos', 'so'], in this order" in note
    )

    two = {"source": str(write_jsonl(tmp_path / "two.jsonl", [row for row in rows if "so" not in str(row)]))}
    with pytest.raises(
        ModelError, match=r"has a head of another number of classes than this run; save it without the head"
    ):
        train(parse(values | {"data": two}), say=silent)

    # The head of an adapter takes the place of the model's.
    run = train(parse(values | {"model": classification["model"]}, ["training.epochs=1"]), say=silent)
    assert run.labels == ["neg", "pos", "so"]
    for start in (f"model.adapters=[{run.adapter_path}]", f"training.start_from={run.adapter_path}"):
        assert prepare(parse(values, [f"model.name={folder}", start])).rows.labels == run.labels


@pytest.mark.parametrize(
    "field", ["rank_pattern={valu: 4}", "alpha_pattern={valu: 4}", "exclude_modules=[valu]", "modules_to_save=[valu]"]
)
def test_so_it_is_in_the_other_fields(classification: Values, field: str):
    with pytest.raises(
        ModelError, match=rf"method\.{field.partition('=')[0]}: no module of the model is called 'valu'; did you mean"
    ):
        make_plan(prepare(parse(classification, [f"method.{field}"])))


@pytest.mark.parametrize("method", ["lora", "peft:lora"])
def test_a_name_that_no_module_has_is_an_error(classification: Values, method: str):
    run = parse(classification | {"method": {"name": method, "r": 2, "target_modules": ["query", "valu"]}})
    for attempt in (lambda: train(run, say=silent), lambda: make_plan(prepare(run))):
        with pytest.raises(
            ModelError, match=r"target_modules: no module of the model is called 'valu'; did you mean 'value'"
        ):
            attempt()


def test_through_peft_it_is_a_warning():
    from peft import get_peft_model
    from torch import nn

    from rankfold import PlainLoraConfig

    with pytest.warns(UserWarning, match="no module of the model is called 'zzz'"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), PlainLoraConfig(r=2, target_modules=["0", "zzz"]))  # pyright: ignore


def test_a_method_that_trains_nothing_is_refused(language_model: Values):
    run = parse(language_model | {"method": {"name": "peft:trainable_tokens"}})
    with pytest.raises(ModelError, match="it trains no parameter"):
        train(run, say=silent)


def test_a_method_that_reads_weights_can_be_counted(language_model: Values):
    """PEFT makes its tensors from the base's values, which a model on the meta device does not have."""
    run = parse(language_model | {"method": {"name": "peft:adamss", "target_modules": ["q_proj", "v_proj"]}})
    plan, result = make_plan(prepare(run)), train(run, say=silent)
    assert plan.budget.adapter == result.adapter > 0


def test_a_schedule_that_sees_a_number_go_bad_diverged(classification: Values, monkeypatch: pytest.MonkeyPatch):
    from rankfold.train.trainers import CarefulTrainer, DivergedError

    def bad(*args: Any, **kwargs: Any) -> None:
        raise FloatingPointError("the scores are not finite")

    monkeypatch.setattr(CarefulTrainer, "train", bad)
    with pytest.raises(DivergedError, match="the scores are not finite"):
        train(parse(classification), say=silent)


def test_an_unknown_attention_is_named(classification: Values):
    run = parse(classification, ["model.attention=zzz"])
    for attempt in (lambda: train(run, say=silent), lambda: make_plan(prepare(run))):
        with pytest.raises(ModelError, match=r"model\.attention: .*zzz"):
            attempt()


@pytest.mark.parametrize("field", ["target_modules=(", "exclude_modules='['", "rank_pattern={'(': 2}"])
def test_a_pattern_that_is_none(classification: Values, field: str):
    with pytest.raises(RunFileError, match=rf"method\.{field.partition('=')[0]}: .* is not a valid regular expression"):
        parse(classification, [f"method.{field}"])
