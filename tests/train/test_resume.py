"""`--resume`: no step that was not asked for, and no setting that would be ignored."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import sentiment, write_jsonl
from transformers import TrainerCallback

from rankfold.runfile.load import parse
from rankfold.runfile.problems import RunFileError
from rankfold.train.folder import FolderError
from rankfold.train.run import train

Values = dict[str, Any]


def silent(sentence: str) -> None:
    pass


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("length", ["max_steps=7", "epochs=1.75"])  # both end within an epoch of four steps
def test_a_finished_run_makes_no_more_steps(classification: Values, length: str):
    options = ["training.epochs=null", f"training.{length}"]
    first = train(parse(classification, options), say=silent)
    before = weights(first.adapter_path)
    for _ in range(2):
        again = train(parse(classification, options), resume=True, say=silent)
        assert (again.steps, again.after, again.before) == (7, first.after, first.before)
        after = weights(again.adapter_path)
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_run_that_was_moved_ends_with_the_best_all_the_same(classification: Values, tmp_path: Path):
    options = ["training.learning_rate=0.5"]  # the accuracy never rises
    first = train(parse(classification, options), say=silent)
    assert first.best_step is not None
    assert first.best_step < first.steps
    (tmp_path / "run").rename(tmp_path / "moved")
    again = train(parse(classification, [*options, f"output={tmp_path / 'moved'}"]), resume=True, say=silent)
    assert (again.best_step, again.after) == (first.best_step, first.after)


def test_another_number_of_processes_is_told(classification: Values, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        train(parse(classification), callbacks=[Killed(5)], say=silent)
    whole = tmp_path / "run" / "checkpoints" / "checkpoint-4"
    for name in ("rng_state_0.pth", "rng_state_1.pth"):
        shutil.copy(whole / "rng_state.pth", whole / name)
    (whole / "rng_state.pth").unlink()
    (note,) = train(parse(classification), resume=True, say=silent).notes
    assert note.startswith(
        "checkpoint-4 was made by 2 processes, and this run has 1: from here on a step takes 1/2 of the rows"
    )


def test_less_than_was_made_is_said_and_no_step(classification: Values):
    options = ["training.epochs=null", "training.keep_best=false"]
    first = train(parse(classification, [*options, "training.max_steps=7"]), say=silent)
    said: list[str] = []
    again = train(parse(classification, [*options, "training.max_steps=5"]), resume=True, say=said.append)
    assert again.steps == 7
    assert again.after == first.after
    assert "the run had made 7 steps already, more than the 5 asked for now; none was made" in said


@pytest.mark.parametrize(
    "override",
    ["learning_rate=1", "optimizer=sgd", "batch_size=4", "evaluate_every=4", "seed=1", "extra={adam_beta1: 0.5}"],
)
def test_what_a_checkpoint_decides_is_refused(classification: Values, tmp_path: Path, override: str):
    options = ["training.epochs=null", "training.max_steps=2"]
    train(parse(classification, options), say=silent)
    saved = (tmp_path / "run" / "run.yaml").read_text()
    name = override.partition("=")[0]
    with pytest.raises(FolderError, match=rf"training\.{name}.* may change\)"):
        train(parse(classification, [*options, f"training.{override}"]), resume=True, say=silent)
    assert (tmp_path / "run" / "run.yaml").read_text() == saved


def test_replaced_rows_are_refused(classification: Values, reviews: Path, tmp_path: Path):
    train(parse(classification, ["data.max_test=4"]), say=silent)

    def resume() -> Any:
        return train(parse(classification, ["data.max_test=4"]), resume=True, say=silent)

    for split in ("train", "validation"):
        path = reviews / f"{split}.jsonl"
        rows = path.read_text()
        path.write_text("".join(line.replace("film", "Film") for line in rows.splitlines(keepends=True)))
        with pytest.raises(FolderError, match=rf"data: '{reviews}' has other {split} rows than when .* put the old"):
            resume()
        path.write_text(rows)  # another file with the same rows
    assert resume().resumed_at == 8
    write_jsonl(reviews / "train.jsonl", sentiment(32, 1000))
    (tmp_path / "run" / "rows.json").unlink()  # a run of an earlier version
    assert resume().resumed_at == 8


def test_a_schedule_cannot_be_made_longer(classification: Values):
    scheduled = classification | {"method": {"name": "adalora", "r": 4, "target_r": 2, "target_modules": "all-linear"}}
    result = train(parse(scheduled), say=silent)
    assert (result.ranks, result.ranks_at_start) == (2 * 13, 4 * 13)  # the pooler is a linear layer too
    assert ("ranks kept", "26 of 52") in result.lines()
    assert "ranks kept | 26 of 52 |" in (result.adapter_path / "README.md").read_text()
    with pytest.raises(FolderError, match=r"training\.epochs was 2\.0, is 3\.0"):
        train(parse(scheduled, ["training.epochs=3"]), resume=True, say=silent)
    assert train(parse(scheduled, ["training.eval_batch_size=4"]), resume=True, say=silent).steps == 8


@pytest.mark.parametrize(
    "method",
    [
        {"name": "peft:adalora", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 3, "deltaT": 1, "total_step": 8},
        {"name": "peft:adamss", "r": 4, "num_subspaces": 2, "use_asa": True, "asa_target_subspaces": 3, "init_warmup": 1,
         "final_warmup": 5, "mask_interval": 1},
    ],
    ids=["adalora", "adamss"],
)  # fmt: skip
def test_peft_methods_that_choose_ranks_end_with_the_last_step_and_start_again(
    classification: Values, tmp_path: Path, method: Values
):
    """Their checkpoints lack what the ranks are chosen by; adalora's best one could not even be loaded."""
    values = classification | {"method": method | {"target_modules": ["query", "value"]}}
    values["training"] = values["training"] | {"learning_rate": 0.05, "metric": "loss"}
    whole = train(parse(values, [f"output={tmp_path / 'whole'}"]), say=silent)
    assert (whole.steps, whole.best_step) == (8, None)
    with pytest.raises(KeyboardInterrupt):
        train(parse(values), callbacks=[Killed(5)], say=silent)
    said: list[str] = []
    again = train(parse(values), resume=True, say=said.append)
    assert any("checkpoint-4 is left alone" in sentence for sentence in said)
    assert (again.resumed_at, again.before, again.after) == (None, whole.before, whole.after)
    first, second = weights(whole.adapter_path), weights(again.adapter_path)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(RunFileError, match=r"training\.keep_best: .* cannot go back to a checkpoint"):
        parse(values, ["training.keep_best=true"])


class Killed(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_ranks_that_end_where_they_start_are_named(classification: Values):
    scheduled = classification | {"method": {"name": "adalora", "r": 8, "target_modules": "all-linear"}}
    result = train(parse(scheduled, ["training.epochs=null", "training.max_steps=3"]), say=silent)
    assert any("r 8 to 8" in note and "nothing is ever pruned" in note for note in result.notes)
