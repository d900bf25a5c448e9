"""Every task through every command: init, validate, train, resume, compare's row scores, fold's probe, the model card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import write_jsonl

from rankfold import cli
from rankfold.compare.file import parse as parse_compare
from rankfold.compare.trial_file import TrialLine
from rankfold.compare.trial_process import measure
from rankfold.fold import fold_adapter
from rankfold.runfile.load import load, parse
from rankfold.runfile.problems import RunFileError
from rankfold.tasks import table
from rankfold.train.data import load_rows
from rankfold.train.metrics import read_metrics
from rankfold.train.run import evaluate, train
from rankfold.train.scores import RowScores

Values = dict[str, Any]

PIPELINES = {"preference": "text-generation"}


def preferences(folder: Path) -> Path:
    rows = [{"prompt": f"{i} plus {i} is", "chosen": f" {2 * i}", "rejected": f" {2 * i + 1}"} for i in range(40)]
    return write_jsonl(folder / "pairs.jsonl", rows)


def tagged(folder: Path) -> Path:
    names = [("Ada", "Lovelace"), ("Alan", "Turing"), ("Grace", "Hopper")]
    rows = [
        {"words": ["met", *names[i % 3], str(i)], "tags": ["O", "B-PER", "I-PER", "O"]}
        | ({} if i % 2 else {"words": ["at", "noon", str(i)], "tags": ["O", "B-TIME", "O"]})
        for i in range(40)
    ]
    return write_jsonl(folder / "words.jsonl", rows)


def pictures(folder: Path) -> Path:
    for i in range(40):
        place = folder / "pictures" / ("dark" if i % 2 else "light")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + i % 3, 8), (i if i % 2 else 255 - i,) * 3).save(place / f"{i:02}.png")
    return folder / "pictures"


def texts(folder: Path) -> Path:
    rows = [{"prompt": f"{i}:", "completion": "ab" * (1 if i % 3 else 12) + str(i)} for i in range(40)]
    return write_jsonl(folder / "texts.jsonl", rows)


#: name of the task → which tiny model, what makes its rows.
TASKS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "preference": ("llama", preferences),
    "token-classification": ("bert", tagged),
    "image-classification": ("vit", pictures),
}
every = pytest.mark.parametrize("task", TASKS)
#: Of one that has tests of its own elsewhere.
MORE: dict[str, tuple[str, Callable[[Path], Path]]] = {"causal-lm": ("llama", texts)}


@pytest.fixture
def values(task: str, tmp_path: Path, request: pytest.FixtureRequest) -> Values:
    """A run file's values for eight steps."""
    model, rows = (TASKS | MORE)[task]
    return {
        "model": str(request.getfixturevalue(model)),
        "task": task,
        "data": {"source": str(rows(tmp_path)), "validation": 0.2, "test": 0.2},
        "method": {"name": "rasa", "r": 2, "shared_rank": 1, "target_modules": "all-linear", "lora_dropout": 0.1},
        "training": {"max_steps": 8, "batch_size": 4, "learning_rate": 0.02, "log_every": 1, "evaluate_every": 4},
        "output": str(tmp_path / "run"),
    }


def silent(sentence: str) -> None:
    pass


@every
def test_the_written_files_are_valid(task: str, tmp_path: Path):
    run, compare = tmp_path / "run.yaml", tmp_path / "compare.yaml"
    assert cli.main(["init", str(run), "--task", task]) == 0
    assert cli.main(["validate", str(run)]) == 0
    assert cli.main(["init", str(compare), "--task", task, "--compare"]) == 0
    from rankfold.compare.file import load as load_compare

    file = load_compare(compare)
    assert file.task == task
    assert table.get(task).metrics[file.training.metric or next(iter(table.get(task).metrics))].of_rows


@every
def test_commands(task: str, values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "run.yaml"
    file.write_text(parse(values).to_yaml())
    assert cli.main(["train", str(file), "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "steps 8 of 4 rows" in said
    assert ("tokens" in said) == (task != "image-classification")
    assert not (tmp_path / "run").exists()
    assert cli.main(["train", str(file)]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 8
    assert result["after"].keys() == table.get(task).metrics.keys()
    assert result["after"]["loss"] < result["before"]["loss"]
    adapter = tmp_path / "run" / "adapter"
    assert sorted(entry.name for entry in adapter.iterdir() if entry.is_dir()) == []
    card = (adapter / "README.md").read_text()
    assert f"pipeline_tag: {PIPELINES.get(task, task)}" in card
    assert f"{table.get(task).models[0]}.from_pretrained" in card
    assert load(tmp_path / "run" / "run.yaml").task == task
    report = fold_adapter(adapter, tmp_path / "folded")
    assert report.probe["max_logit_error"] < 1e-4  # pyright: ignore
    assert cli.main(["fold", str(adapter), "-o", str(tmp_path / "merged"), "--profile", "merged"]) == 0
    assert "probe: largest logit difference" in capsys.readouterr().out


@every
def test_resumed_is_uninterrupted(task: str, values: Values, tmp_path: Path):
    """Bit for bit, dropout included: killed after the first checkpoint, resumed in a fresh model."""
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                raise KeyboardInterrupt

    values["training"] |= {"keep_best": False}
    whole = train(parse(values, [f"output={tmp_path / 'whole'}"]), say=silent)
    with pytest.raises(KeyboardInterrupt):
        train(parse(values), say=silent, callbacks=[Kill()])
    resumed = train(parse(values), resume=True, say=silent)
    assert resumed.resumed_at == 4
    assert resumed.after == whole.after
    assert resumed.before == whole.before
    one, two = (load_file(r.adapter_path / "adapter_model.safetensors") for r in (whole, resumed))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("task", [*TASKS, *MORE])
def test_row_scores_are_the_metric(task: str, values: Values, tmp_path: Path):
    """The mean over the rows, by weight, is what the run prints, stores and chooses its best checkpoint by, whatever the batches.

    Of validation rows in the midst of the run, of test rows before and after it: their lengths differ, and so do those of batches.
    """
    names = [name for name, metric in table.get(task).metrics.items() if metric.of_rows]
    seen: list[tuple[str, RowScores, float]] = []

    def look(trainer: Any, split: str, rows: Any) -> dict[str, float]:
        metrics = evaluate(trainer, split, rows)
        for name in names:
            scores = trainer.row_scores[name]
            seen.append((name, scores, metrics[name]))
            assert len(scores.items) == len(rows)
        return metrics

    values["training"] |= {"keep_best": False}
    found = []
    for size in (1, 3, 64):
        run = parse(values, [f"training.eval_batch_size={size}", f"output={tmp_path / str(size)}"])
        result = train(run, say=silent, measure=look)
        logged = {row["step"]: row for row in read_metrics(Path(run.output, "metrics.jsonl")) if "eval_loss" in row}
        during = [logged[4][f"eval_{table.get(task).logged_as(name)}"] for name in result.after]
        found.append([*result.before.values(), *result.after.values(), *during])
    assert len(seen) == 2 * 3 * len(names)
    for name, scores, metric in seen:
        assert scores.mean == pytest.approx(metric, abs=1e-6), name
    assert found[1] == pytest.approx(found[0], rel=1e-5, abs=1e-6)
    assert found[2] == pytest.approx(found[0], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("task", [name for name in TASKS if name != "preference"])  # where TRL smooths by itself
def test_row_scores_with_label_smoothing(task: str, values: Values):
    """It takes the labels out of the batch before the model sees them."""
    metric = next(name for name in table.get(task).metrics if name != "loss")
    found: list[tuple[float, float]] = []

    def look(trainer: Any, split: str, rows: Any) -> dict[str, float]:
        metrics = evaluate(trainer, split, rows)
        found.append((trainer.row_scores[metric].mean, metrics[metric]))
        return metrics

    values["data"] |= {"max_test": 4}
    values["training"] |= {"max_steps": 2, "evaluate_every": 2, "extra": {"label_smoothing_factor": 0.1}}
    train(parse(values), say=silent, measure=look)
    assert len(found) == 2
    for mean, said in found:
        assert mean == pytest.approx(said, abs=1e-5)


@every
def test_a_trial_of_a_comparison(task: str, values: Values, tmp_path: Path):
    metric = {"token-classification": "f1", "classification": "macro_f1"}.get(task, "accuracy")
    values["training"] |= {"keep_best": False, "metric": metric, "max_steps": 4}
    folder = tmp_path / "out" / "trials" / "x"
    values["output"] = str(folder / "run")
    line = TrialLine(
        id="x",
        label="RaSA",
        method="rasa",
        rate=0.02,
        seed=0,
        status="failed",
        greater_is_better=True,
        config={},
        run=values,
        metric=metric,
        command="",
    )
    folder.mkdir(parents=True)
    done = measure(line, folder, until=1)
    assert (done.status, done.steps) == ("done", 4)
    rows = load_rows(parse(values)).splits["test"]
    assert done.items is not None
    assert len(done.items) == len(rows)
    weights = done.weights or [1.0] * len(done.items)
    assert done.test == pytest.approx(sum(w * i for w, i in zip(weights, done.items, strict=True)) / sum(weights))
    assert done.validation is not None
    assert done.before is not None
    assert [step for step, _ in done.curve["validation"]] == [4]
    assert done.parameters["folded"]


@every
def test_fields_that_mean_nothing_are_refused(task: str, values: Values):
    with pytest.raises(RunFileError, match=f"data.packing: means nothing for {task}; remove it"):
        parse(values, ["data.packing=true"])


def test_a_comparison_needs_a_metric_of_rows(tmp_path: Path, bert: Path):
    values = {
        "model": str(bert),
        "task": "preference",
        "data": "x.jsonl",
        "methods": ["lora"],
        "rates": [0.01],
        "seeds": [0],
        "output": str(tmp_path / "out"),
    }
    with pytest.raises(RunFileError, match=r"'loss' is not made of scores of rows, .* use accuracy or margin"):
        parse_compare(values | {"training": {"metric": "loss"}})
    for task, metric in (
        ("token-classification", "f1"),
        ("token-classification", "precision"),
        ("classification", "macro_f1"),
    ):
        assert parse_compare(values | {"task": task, "training": {"metric": metric}}).training.metric == metric
