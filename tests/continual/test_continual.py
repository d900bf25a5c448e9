"""Tasks in a row on tiny models: what each rule trains, what is measured, and a killed row that goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from tiny import write_jsonl
from torch import Tensor

from rankfold.commands import continual as command
from rankfold.continual import run as module
from rankfold.continual.file import load, parse
from rankfold.continual.result import ContinualResult
from rankfold.continual.run import continual
from rankfold.io.models import ModelError
from rankfold.runfile.load import load as load_run
from rankfold.runfile.schema import RunFile
from rankfold.train import model as models
from rankfold.train.folder import FolderError
from rankfold.train.run import train

Values = dict[str, Any]


def silent(sentence: str) -> None:
    pass


def learn(values: Values, **changes: Any) -> ContinualResult:
    return continual(parse(values | changes), say=silent)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def head(folder: Path) -> Tensor:
    return next(tensor for key, tensor in weights(folder).items() if key.endswith("classifier.weight"))


def scores(run: RunFile, adapter: Path) -> Tensor:
    """Of a fixed batch, by the run's model with an adapter."""
    labels = [str(c) for c in run.data.labels or ()]
    base, _ = models.load_model(run, run.model.name, models.load_config(run, run.model.name, labels))
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 24)[None], attention_mask=torch.ones(1, 20)).logits


def test_sd_lora_by_its_own_rule(values: Values):
    result, out = learn(values), Path(values["output"])
    first, second = weights(out / "task-1/adapter"), weights(out / "task-2/adapter")
    for key, tensor in second.items():
        if key.endswith("past_down"):
            assert torch.equal(tensor, first[key.replace("past_down", "down")])
    config = json.loads((out / "task-2/adapter/adapter_config.json").read_text())
    assert (config["task"], load_run(out / "task-2/run.yaml").method.fields["task"]) == (1, 1)
    assert result.next_task == "own"
    assert [len(row) for row in result.matrix] == [1, 2]
    saved = json.loads((out / "continual.json").read_text())
    assert saved["matrix"] == result.matrix
    assert saved["averages"] == result.measures.averages
    assert saved["tasks"] == ["even, neg", "odd, pos"]
    assert (out / "continual.svg").stat().st_size > 5000
    of_second = json.loads((out / "task-2/result.json").read_text())
    assert result.matrix[1] == [of_second["others"]["task-1"]["accuracy"], of_second["after"]["accuracy"]]
    logged = (out / "task-2/metrics.jsonl").read_text()
    assert logged.count('"test_accuracy"') == 2  # what is measured on other tasks is not the run's
    before = (out / "continual.json").read_bytes(), (out / "continual.svg").read_bytes()
    learn(values)
    assert ((out / "continual.json").read_bytes(), (out / "continual.svg").read_bytes()) == before


def test_kd_is_done_before_a_task_is_measured_and_saved(values: Values):
    method = values["method"] | {"kd": True, "kd_threshold": 2.0}
    learn(values, method=method, training=values["training"] | {"max_steps": 2})
    out = Path(values["output"])
    second = weights(out / "task-2/adapter")
    assert not any(tensor.any() for key, tensor in second.items() if key.endswith(".up"))
    assert all(tensor.any() for key, tensor in second.items() if key.endswith("past_delta"))


@pytest.mark.parametrize("over", ["task", "seen"])
def test_the_same_adapter_goes_on_and_only_its_classes_are_learnt(values: Values, over: str, tmp_path: Path):
    values = values | {"method": values["method"] | {"name": "lora"}, "loss_over": over}
    learn(values)
    out = Path(values["output"])
    assert load_run(out / "task-2/run.yaml").training.start_from == str(out / "task-1/adapter")
    one, two = head(out / "task-1/adapter"), head(out / "task-2/adapter")
    assert torch.equal(one[:2], two[:2]) == (over == "task")
    assert not torch.equal(one[2:], two[2:])
    losses = [json.loads(line) for line in (out / "task-2/metrics.jsonl").read_text().splitlines()]
    loss = next(row["loss"] for row in losses if "loss" in row)
    assert 0.4 < loss < 1.0 if over == "task" else loss > 1.1  # about ln 2 of two classes, ln 4 of four
    _other_tasks_are_refused(values, tmp_path)


def test_fresh_adapters_are_merged_and_then_added_up(values: Values):
    result, out = learn(values, method=values["method"] | {"name": "lora"}, next_task="fresh"), Path(values["output"])
    run = load_run(out / "task-2/run.yaml")
    assert run.model.adapters == [str(out / "task-1/adapter")]
    assert result.adapter == str(out / "adapter")
    torch.testing.assert_close(
        scores(load_run(out / "task-1/run.yaml"), out / "adapter"),
        scores(run, out / "task-2/adapter"),
        rtol=1e-5,
        atol=1e-6,
    )
    assert json.loads((out / "adapter/fold_report.json").read_text())["needed_rank"] == 4  # both ranks
    card = (out / "task-2/adapter/README.md").read_text()
    assert f"model = PeftModel.from_pretrained(model, '{out}/task-1/adapter').merge_and_unload()\n" in card
    notes = json.loads((out / "task-2/result.json").read_text())["notes"]
    assert any("this adapter belongs on the model with" in note for note in notes)


def test_images(values: Values, vit: Path, tmp_path: Path):
    for split in ("train", "test"):
        for colour in ("red", "blue", "green", "white"):
            folder = tmp_path / "pictures" / split / colour
            folder.mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (16 + number, 16), colour).save(folder / f"{number}.png")
    data = {"source": str(tmp_path / "pictures")}
    values |= {"task": "image-classification", "model": str(vit), "data": data, "split": {"parts": 2, "seed": 3}}
    result = learn(values, method={"name": "sd_lora", "r": 2, "target_modules": "all-linear"})
    assert sorted(", ".join(result.tasks).split(", ")) == ["blue", "green", "red", "white"]
    assert 0 <= result.measures.average_anytime <= 1


def test_language_models_have_a_matrix_of_losses(values: Values, llama: Path, tmp_path: Path):
    def rows(name: str, sign: str) -> str:
        found = [{"prompt": f"{i} {sign} {i}", "completion": f" {2 * i}"} for i in range(16)]
        return str(write_jsonl(tmp_path / f"{name}.jsonl", found))

    tasks = [rows("sums", "plus"), {"source": rows("products", "times"), "max_test": 3}]
    method = {"name": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]}
    changes = {"task": "causal-lm", "model": str(llama), "data": {"test": 0.3}, "method": method}
    del values["split"]
    changes["next_task"] = "fresh"
    result = learn(values, **changes, tasks=tasks)
    assert (result.metric, result.greater_is_better, result.tasks) == ("loss", False, ["sums.jsonl", "products.jsonl"])
    (first,), (again, second) = result.matrix
    assert result.measures.forgettings[1] == pytest.approx(again - first)
    assert result.measures.averages[1] == pytest.approx((again + second) / 2)
    more = learn(values, **changes, tasks=[*tasks, rows("differences", "minus")])  # goes on where it stopped
    assert more.matrix[:2] == result.matrix
    out = Path(values["output"])
    assert json.loads((out / "adapter/fold_report.json").read_text())["needed_rank"] == 6
    model = {"name": str(llama), "dtype": "bfloat16", "adapters": [str(out / "task-1/adapter")]}
    run = load_run(out / "task-2/run.yaml")
    narrow = run.model_copy(update={"model": run.model.model_validate(model), "output": str(tmp_path / "narrow")})
    with pytest.raises(
        ModelError, match=r"model\.adapters\.0: small updates .* weights of torch\.bfloat16; set model\.dtype: float32"
    ):
        train(narrow, say=silent)
    gone = run.model_copy(
        update={"model": run.model.model_copy(update={"adapters": ["gone"]}), "output": str(tmp_path / "g")}
    )
    with pytest.raises(
        ModelError, match=r"model\.adapters\.0: 'gone' cannot be merged into the model: gone does not exist"
    ):
        train(gone, say=silent)


def test_a_row_killed_between_tasks_and_in_one_ends_the_same(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = values | {"output": str(tmp_path / "whole")}
    wanted = learn(whole)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rankfold.continual.start.whole_folder", interrupted)
        with pytest.raises(KeyboardInterrupt):
            learn(values)
    file = tmp_path / "continual.yaml"
    file.write_text(yaml.safe_dump(values))
    dies = (
        "import os, signal, sys\nfrom rankfold.cli import main\nfrom rankfold.train.trainers import CarefulTrainer\n"
        "step = CarefulTrainer.training_step\n"
        "def dying(self, *args, **kwargs):\n"
        "    if self.state.global_step == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, *args, **kwargs)\n"
        "CarefulTrainer.training_step = dying\n"
        "main(['continual', sys.argv[1]])\n"
    )
    killed = subprocess.run([sys.executable, "-c", dies, str(file)], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    out = Path(values["output"])
    assert (out / "task-2/checkpoints/checkpoint-2").is_dir()
    assert not (out / "task-2/result.json").exists()

    trained: list[str] = []

    def counted(run: RunFile, **kwargs: Any) -> Any:
        trained.append(Path(run.output).name)
        result = train(run, **kwargs)
        assert result.resumed_at == 2
        return result

    monkeypatch.setattr(module, "train", counted)
    result = continual(load(file), say=silent)
    assert trained == ["task-2"]
    assert (result.matrix, result.measures) == (wanted.matrix, wanted.measures)
    ours, theirs = (weights(folder / "task-2/adapter") for folder in (out, tmp_path / "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def _other_tasks_are_refused(values: Values, tmp_path: Path) -> None:
    """In a folder where tasks of plain LoRA are done."""
    with pytest.raises(FolderError, match=r"training\.learning_rate was 0\.01, is 0\.02"):
        learn(values, training=values["training"] | {"learning_rate": 0.02})
    # Which a run that goes on may change; here the tasks of one row would be trained for different lengths
    with pytest.raises(
        FolderError, match=r"task-1' is done, and was trained otherwise: training\.max_steps was 4, is 6"
    ):
        learn(values, training=values["training"] | {"max_steps": 6})
    with pytest.raises(FolderError, match=r"loss_over was '(task|seen)', is 'all'"):
        learn(values, loss_over="all")
    train_rows = Path(values["data"]["source"], "train.jsonl")
    before = train_rows.read_text()
    train_rows.write_text(before.replace("film", "movie"))
    with pytest.raises(FolderError, match=r"has other train rows than when the work in '.*task-1' began"):
        learn(values)
    train_rows.write_text(before)
    more = tmp_path / "more.jsonl"
    write_jsonl(more, [{"text": f"{c} {i}", "label": c} for c in ("new", "newer") for i in range(4)])
    new = {"classes": ["new", "newer"], "train": str(more), "test": str(more)}
    tasks = [{"classes": ["even", "neg"]}, {"classes": ["odd", "pos"]}, new]
    with pytest.raises(FolderError, match=r"has the classes even, neg, odd, pos, and it cannot grow by new, newer"):
        learn(values, split=None, tasks=tasks)
    with pytest.raises(FolderError, match="is not empty and holds no tasks in a row"):
        learn(values, output=str(tmp_path))


def test_the_plan_of_the_first_task(values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "continual.yaml"
    file.write_text(yaml.safe_dump(values))
    assert command.run(command.Options(run_file=str(file), dry_run=True)) == 0
    said = capsys.readouterr().out
    assert "plan of the first task (nothing was trained)" in said
    assert "even, neg" in said
    assert "next_task: own" in said
    assert not Path(values["output"]).exists()
