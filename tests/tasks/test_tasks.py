"""A task is one class in one place: here is a third one, which the package has never heard of."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import sentiment, write_jsonl

import rankfold
from rankfold import cli
from rankfold.errors import RankfoldError
from rankfold.plan.meta import meta_model
from rankfold.runfile.load import load, parse
from rankfold.runfile.problems import RunFileError
from rankfold.tasks import table
from rankfold.tasks.rows import DataError, Encoded, Rows
from rankfold.tasks.task import Metric, Task
from rankfold.train.run import train


class Tagging(Task):
    """Words in, a tag for each out."""

    name = "tagging"
    summary = "words in, tags out"
    kinds = (("words", "tags"),)
    targets = ("tags",)
    foreign = ("packing", "loss_on")
    max_length = 32
    models = ("AutoModelForTokenClassification",)
    peft_type = "TOKEN_CLS"
    new_head = True
    metrics = {"right": Metric(greater_is_better=True), "loss": Metric(greater_is_better=False, of_rows=False)}  # noqa: RUF012
    loss_of_batch = True
    weighted = True
    pipeline = "token-classification"
    start = {  # noqa: RUF012
        "model": {"name": "all-minilm-l6-v2"},
        "data": {"source": "words.jsonl"},
        "method": {"r": 4},
        "training": {"max_steps": 2},
    }
    comparison = ("model: all-minilm-l6-v2\ntask: tagging\ndata: words.jsonl\noutput: runs/tags\n", "1", "2")

    def problem(self, value: Any, column: str, kind: tuple[str, ...]) -> str | None:
        return None if isinstance(value, list) and all(isinstance(w, str) for w in value) else "is not a list of words"

    def finish(self, rows: Rows, data: Any) -> None:
        rows.labels = sorted({tag for row in rows.splits["train"]["tags"] for tag in row})
        index = {tag: i for i, tag in enumerate(rows.labels)}
        for name, split in rows.splits.items():
            rows.splits[name] = split.map(lambda row: {"tags": [index[tag] for tag in row["tags"]]})

    def encode(self, rows: Rows, split: str, processor: Any, max_length: int | None, data: Any) -> Encoded:
        found = processor(
            rows.splits[split]["words"][:], is_split_into_words=True, truncation=True, max_length=max_length
        )
        labels = [[tags[word] for word in found.word_ids(i)] for i, tags in enumerate(rows.splits[split]["tags"])]
        from datasets import Dataset

        made = Dataset.from_dict({**found, "labels": labels})
        return Encoded(made, [len(ids) for ids in found["input_ids"]])

    def trainer(self) -> type:
        from transformers import Trainer

        return Trainer

    def arguments_class(self) -> type:
        from transformers import TrainingArguments

        return TrainingArguments

    def arguments(self, data: Any, max_length: int | None) -> dict[str, Any]:
        return {"label_names": ["labels"]}

    def options(self, processor: Any, labels: list[str]) -> dict[str, Any]:
        from transformers import DataCollatorForTokenClassification

        def right(prediction: Any) -> dict[str, float]:
            known = prediction.label_ids != -100
            return {"right": float(np.mean((prediction.predictions.argmax(-1) == prediction.label_ids)[known]))}

        return {"data_collator": DataCollatorForTokenClassification(processor), "compute_metrics": right}

    def scores(
        self, outputs: Any, inputs: dict[str, Any], metric: str, trainer: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (output,) = outputs
        known = inputs["labels"] != -100
        right = (output.logits.argmax(-1) == inputs["labels"]) & known
        return right.double().sum(1) / known.sum(1), known.double().sum(1)


@pytest.fixture
def tagging() -> Iterator[Task]:
    yield table.register(Tagging())
    del table.TASKS["tagging"]


@pytest.fixture
def words(tmp_path: Path) -> Path:
    rows = [{"tokens": [f"w{i}", "x"], "tags": ["NOUN", "X"]} for i in range(24)]
    return write_jsonl(tmp_path / "words.jsonl", rows)


def overrides(bert: Path, words: Path, tmp_path: Path) -> list[str]:
    data = f"data={{source: {words}, validation: 0.3, columns: {{words: tokens}}}}"
    return [f"model={bert}", data, "method.target_modules=all-linear", f"output={tmp_path / 'run'}"]


def test_a_new_task_goes_everywhere(tagging: Task, bert: Path, words: Path, tmp_path: Path, capsys: Any):
    file = tmp_path / "run.yaml"
    assert cli.main(["init", str(file), "--task", "tagging"]) == 0
    assert cli.main(["validate", str(file)]) == 0
    assert cli.main(["validate", str(file), "training.metric=accuracy"]) == 1
    assert "'accuracy' is not a metric of tagging; known: loss, right" in capsys.readouterr().err
    changed = overrides(bert, words, tmp_path)
    assert cli.main(["train", str(file), *changed, "--dry-run"]) == 0
    assert "head 34" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "run").exists()
    assert cli.main(["train", str(file), *changed]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 2
    assert result["labels"] == ["NOUN", "X"]
    assert result["after"].keys() == {"loss", "right"}
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "pipeline_tag: token-classification" in card
    assert "AutoModelForTokenClassification.from_pretrained" in card
    assert load(tmp_path / "run" / "run.yaml").data.columns.names["words"] == "tokens"
    assert meta_model(str(bert), "tagging", labels=3).num_labels == 3
    compare = tmp_path / "compare.yaml"
    assert cli.main(["init", str(compare), "--task", "tagging", "--compare"]) == 0
    assert "task: tagging" in compare.read_text()


def test_a_new_task_is_compared(tagging: Task, bert: Path, words: Path, tmp_path: Path):
    from rankfold.train.run import evaluate

    seen: list[float] = []

    def look(trainer: Any, split: str, rows: Any) -> dict[str, float]:
        metrics = evaluate(trainer, split, rows)
        seen.append(trainer.row_scores["right"].mean - metrics["right"])
        return metrics

    values = {
        "task": "tagging",
        "model": str(bert),
        "method": "lora",
        "data": "-",
        "output": "-",
        "training": {"max_steps": 1},
    }
    train(parse(values, overrides(bert, words, tmp_path)), measure=look, say=lambda _: None)
    assert seen == pytest.approx([0, 0], abs=1e-6)


def test_bad_rows_of_a_new_task(tagging: Task, bert: Path, tmp_path: Path):
    path = write_jsonl(tmp_path / "bad.jsonl", [{"tokens": "a b", "tags": ["X"]}])
    values = {"task": "tagging", "model": str(bert), "method": "lora", "data": "-", "output": "-"}
    with pytest.raises(DataError, match="train, row 1: column 'words' is not a list of words"):
        train(parse(values, overrides(bert, path, tmp_path)))
    with pytest.raises(RunFileError, match=r"data\.packing: means nothing for tagging; remove it"):
        parse(values, ["data.packing=true"])


def test_the_table():
    assert list(table.TASKS) == [
        "causal-lm",
        "classification",
        "image-classification",
        "preference",
        "token-classification",
    ]
    with pytest.raises(RankfoldError, match=r"task='causal_lm' is not known; did you mean 'causal-lm'\?"):
        table.get("causal_lm")
    other = type("Classification", (Tagging,), {"name": "classification", "__module__": "elsewhere"})
    with pytest.raises(RankfoldError, match="name='classification' is taken by Classification; choose another"):
        table.register(other())
    before = table.get("classification")
    assert table.register(type(before)()) is not before  # a cell that is run twice


def test_no_task_is_named_outside_its_room():
    src = Path(rankfold.__file__).parent
    told_apart = re.compile(
        r"\btask (==|!=) |[\"']causal-lm[\"'] if|Literal\[[\"']causal-lm|== [\"'](classification|causal-lm)[\"']"
    )
    for path in src.rglob("*.py"):
        if path.parent.name != "tasks":
            found = [line for line in path.read_text(encoding="utf-8").splitlines() if told_apart.search(line)]
            assert not found, f"{path}: {found}"


# --- built once ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a run builds what it should build once, and how many texts it tokenises."""
    from transformers import PreTrainedTokenizerFast, TrainingArguments

    from rankfold.methods.lora import PlainLoraConfig
    from rankfold.runfile import arguments, checks
    from rankfold.train import prepare

    counts = {"config": 0, "arguments": 0, "objects": 0, "texts": 0}

    def count(owner: Any, name: str, key: str, size: Any = lambda *_: 1) -> None:
        original = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counts[key] += size(*args)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    count(PlainLoraConfig, "__post_init__", "config")
    assert prepare.trainer_arguments is checks.trainer_arguments is arguments.trainer_arguments
    count(prepare, "trainer_arguments", "arguments")
    count(checks, "trainer_arguments", "arguments")
    count(TrainingArguments, "__post_init__", "objects")
    count(
        PreTrainedTokenizerFast,
        "__call__",
        "texts",
        lambda _, texts, *rest: len(texts) if isinstance(texts, list) else 1,
    )
    return counts


def test_a_run_builds_everything_once(counted: dict[str, int], bert: Path, llama: Path, tmp_path: Path):
    files = {split: str(write_jsonl(tmp_path / f"{split}.jsonl", sentiment(n, n))) for split, n in
             (("train", 16), ("validation", 8), ("test", 4))}  # fmt: skip
    values = {
        "model": str(bert), "task": "classification", "data": files, "method": "lora",
        "training": {"max_steps": 2, "evaluate_every": 1}, "output": str(tmp_path / "run"),
    }  # fmt: skip
    train(parse(values, ["method={name: lora, target_modules: all-linear}"]), say=lambda _: None)
    assert counted == {"config": 1, "arguments": 1, "objects": 1, "texts": 16 + 8 + 4}

    counted.update(dict.fromkeys(counted, 0))
    rows = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": f"{i} is", "completion": f" {i}"} for i in range(20)])
    values |= {
        "model": str(llama),
        "task": "causal-lm",
        "data": {"source": str(rows), "validation": 0.3},
        "output": str(tmp_path / "lm"),
    }
    train(parse(values), say=lambda _: None)
    assert counted == {"config": 1, "arguments": 1, "objects": 1, "texts": 2 * 20}  # each prompt alone, too


def test_a_plan_builds_everything_once(counted: dict[str, int], bert: Path, tmp_path: Path):
    from rankfold.train.prepare import make_plan, prepare

    rows = write_jsonl(tmp_path / "train.jsonl", sentiment(16))
    values = {"model": str(bert), "task": "classification", "data": str(rows), "method": "lora", "output": "x"}
    prepared = prepare(parse(values, ["method={name: lora, target_modules: all-linear}"]))
    assert make_plan(prepared).budget == make_plan(prepared).budget
    assert counted == {"config": 1, "arguments": 1, "objects": 0, "texts": 16}
