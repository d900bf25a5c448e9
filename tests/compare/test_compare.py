"""Comparisons on tiny models: what their lines say, what a second call repeats, and what goes wrong."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import sentiment, write_jsonl
from transformers import AlbertConfig, AlbertModel, AutoTokenizer

from rankfold.cli import main
from rankfold.commands.compare import print_plan
from rankfold.compare import contenders, selection
from rankfold.compare import trial_process as trial_module
from rankfold.compare.contenders import Entry, resolve
from rankfold.compare.experiment import compare
from rankfold.compare.file import CompareFile, parse
from rankfold.compare.time_left import Estimate
from rankfold.compare.trial_file import TrialLine, append, read
from rankfold.compare.trial_list import make, wanted
from rankfold.tasks.rows import DataError
from rankfold.train.folder import FolderError
from rankfold.train.metrics import read_metrics

Values = dict[str, Any]


def run(values: Values, *overrides: str, **options: Any) -> list[TrialLine]:
    said: list[str] = []
    out = compare(parse(values, overrides), say=said.append, **options)
    return read(out)


def weights(line: TrialLine, out: str) -> dict[str, torch.Tensor]:
    assert line.adapter is not None
    return load_file(Path(out, line.adapter, "adapter_model.safetensors"))


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- lines --------------------------------------------------------------------------------------------------------------


def test_a_line_has_it_all(values: Values, here: list[str]):
    lora, rasa = run(values, command="rankfold compare compare.yaml")
    assert (lora.label, lora.method, lora.where, lora.rate, lora.seed, lora.rung) == (
        "LoRA",
        "peft:lora",
        "all",
        0.01,
        0,
        None,
    )
    assert lora.status == "done"
    assert lora.config == {"r": 2, "target_modules": "all-linear"}
    assert (lora.metric, lora.greater_is_better, lora.weights) == ("accuracy", True, None)
    assert lora.items is not None
    assert len(lora.items) == 9
    assert set(lora.items) <= {0.0, 1.0}
    result = json.loads(Path(lora.run["output"], "result.json").read_text())
    assert lora.test == pytest.approx(result["after"]["accuracy"])
    assert lora.before == pytest.approx(result["before"]["accuracy"])
    assert lora.validation == pytest.approx(result["others"]["validation"]["accuracy"])
    assert [step for step, _ in lora.curve["loss"]] == list(range(1, 9))
    assert [step for step, _ in lora.curve["validation"]] == [4, 8]
    sites = 3 * (4 * 32 + 2 * 48) + 32  # Σ (in + out): query, key, value, output; the two of the MLP; the pooler
    assert lora.parameters == {
        "trained": 2 * sites,
        "head": 34,
        "stored": 2 * sites + 34,
        "folded": 2 * sites,
        "folded_rank": 2,
    }
    assert lora.kept == 2 * sites
    assert set(lora.ranks.values()) == {2}
    assert rasa.parameters["folded_rank"] == 2 - 1 + 3  # the pooler's pool is a small one
    assert rasa.parameters["folded"] == 4 * sites
    assert rasa.kept is not None
    assert rasa.kept < 4 * sites
    assert lora.steps == 8
    assert lora.seconds
    assert lora.peak_bytes
    assert (lora.command, lora.threads) == ("rankfold compare compare.yaml", torch.get_num_threads())
    assert lora.versions["peft"]
    assert Path(values["output"], str(lora.adapter), "adapter_config.json").is_file()


@pytest.mark.parametrize("metric", ["loss", "token_accuracy"])
def test_rows_of_a_language_model_weigh_their_tokens(sums: Values, here: list[str], metric: str):
    (line,) = run(sums | {"methods": sums["methods"][:1]}, f"training.metric={metric}", "training.eval_batch_size=4")
    assert line.weights == [5.0 + i % 3 for i in range(200, 209)]  # " 400", the marks and the end
    assert line.items is not None
    result = json.loads(Path(line.run["output"], "result.json").read_text())
    pairs = list(zip(line.weights, line.items, strict=True))
    assert line.test == pytest.approx(sum(w * x for w, x in pairs) / sum(line.weights))
    assert line.test == pytest.approx(result["after"][metric])


def test_classification_by_loss(values: Values, here: list[str]):
    (line,) = run(values | {"methods": values["methods"][:1]}, "training.metric=loss", "training.eval_batch_size=9")
    result = json.loads(Path(line.run["output"], "result.json").read_text())
    assert line.test == pytest.approx(result["after"]["loss"], rel=1e-5)
    assert not line.greater_is_better


def test_lines_survive_a_kill(tmp_path: Path):
    path = tmp_path / "trials.jsonl"
    line = TrialLine(id="a", label="x\u2028y", method="lora", rate=1e-3, seed=0, status="done", config={}, run={},
                     metric="loss", greater_is_better=False, test=math.nan, items=[1.0, math.inf])  # fmt: skip
    append(path, line)
    with path.open("ab") as file:
        file.write(b'{"id": "b", "lab')
    (found,) = read(path)
    assert (found.label, found.test, found.items) == ("x\u2028y", None, [1.0, None])
    append(path, found)
    assert len(read(tmp_path)) == 1
    assert path.read_bytes().count(b"\n") == 2
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(ValueError, match=r"trials.jsonl:1: not a trial line: missing .* 'id'"):
        read(path)


# --- again --------------------------------------------------------------------------------------------------------------


def test_nothing_is_repeated(values: Values, here: list[str]):
    assert len(run(values)) == 2
    ran = list(here)
    assert len(run(values)) == 2
    assert here == ran
    more = values | {"seeds": [0, 1], "methods": [values["methods"][0], {**values["methods"][1], "label": "RaSA!"}]}
    lines = run(more)
    assert len(here) == 4
    assert {(line.label, line.seed) for line in lines} == {("LoRA", 0), ("LoRA", 1), ("RaSA!", 0), ("RaSA!", 1)}
    assert len(set(here)) == 4


def test_a_line_that_was_not_written_in_time(values: Values, here: list[str]):
    lines = run(values)
    path = Path(values["output"], "trials.jsonl")
    Path(lines[1].run["output"]).parent.joinpath(f"{lines[1].id}.json").write_text(lines[1].to_json())
    path.write_text(path.read_text().splitlines()[0] + "\n" + lines[1].to_json()[:99])
    assert run(values) == lines
    assert len(here) == 2


def test_the_folder_of_another_comparison(values: Values, here: list[str], tmp_path: Path):
    run(values)
    with pytest.raises(FolderError, match=r"other settings: training.max_steps was 8, is 9. Undo"):
        run(values, "training.max_steps=9")
    # Two processes take twice the rows a step, and the labels would be the same
    with pytest.raises(FolderError, match=r"other settings: launch was None, is 'accelerate launch'. Undo"):
        run(values, "launch=accelerate launch")
    with pytest.raises(
        FolderError, match=r"'LoRA' was another one .*\(r was 2, is 4\); give the new one another label"
    ):
        run(values | {"methods": [{**values["methods"][0], "r": 4}]})
    with pytest.raises(FolderError, match="holds no comparison"):
        run(values, f"output={tmp_path / 'reviews'}")
    with pytest.raises(ValueError, match="'LoRA' and 'twin' are the same method"):
        run(values | {"methods": [values["methods"][0], {**values["methods"][0], "label": "twin"}]})
    write_jsonl(tmp_path / "reviews" / "test.jsonl", sentiment(9, 900))
    with pytest.raises(
        FolderError, match=r"the rows of data were others when 'LoRA' in '.*' was run, though their names"
    ):
        run(values)
    assert len(here) == 2


def test_killed_and_resumed(values: Values, here: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """With SIGKILL, in the middle of a trial: it goes on from its checkpoint and ends as if nothing had been."""
    long = [
        "training.max_steps=80",
        "training.evaluate_every=10",
        "methods=[{name: rasa, r: 2, shared_rank: 1, lora_dropout: 0.1}]",
    ]
    (whole,) = run(values, *long, f"output={tmp_path / 'whole'}")
    monkeypatch.undo()
    path = tmp_path / "compare.yaml"
    path.write_text(parse(values, long).to_yaml())
    environment = os.environ | {
        "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    parent = subprocess.Popen(
        [sys.executable, "-m", "rankfold", "compare", str(path)],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    out = Path(values["output"])
    while not list(out.glob("trials/*/run/checkpoints/checkpoint-20/trainer_state.json")):
        assert parent.poll() is None
        time.sleep(0.02)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert not (out / "trials.jsonl").exists()
    metrics = next(out.glob("trials/*/run")) / "metrics.jsonl"
    time.sleep(1)
    ended_at = len(read_metrics(metrics))
    time.sleep(1)
    assert len(read_metrics(metrics)) == ended_at  # the trial did not outlive who started it
    (line,) = run(values, *long)
    result = json.loads(Path(line.run["output"], "result.json").read_text())
    assert result["resumed_at"] >= 20
    assert (line.id, line.test, line.validation, line.items, line.before, line.curve) == (
        whole.id, whole.test, whole.validation, whole.items, whole.before, whole.curve,
    )  # fmt: skip
    assert same_weights(weights(line, values["output"]), weights(whole, str(tmp_path / "whole")))


def test_the_score_before_training_is_measured_once(values: Values, here: list[str]):
    """No learning rate changes it, and test rows can be many."""
    values = values | {"methods": values["methods"][1:], "rates": [1e-2, 1e-3], "seeds": [0, 1]}
    lines = run(values)
    measured = {
        (line.rate, line.seed): any(row["step"] == 0 for row in read_metrics(Path(line.run["output"], "metrics.jsonl")))
        for line in lines
    }
    assert measured == {(1e-2, 0): True, (1e-2, 1): True, (1e-3, 0): False, (1e-3, 1): False}  # a seed has its own head
    befores = {(line.rate, line.seed): line.before for line in lines}
    assert befores[1e-2, 0] == befores[1e-3, 0]
    assert befores[1e-2, 1] == befores[1e-3, 1]
    assert None not in befores.values()


def test_a_trial_does_not_depend_on_who_measured_first(values: Values, here: list[str], tmp_path: Path):
    method = values["methods"][1] | {"lora_dropout": 0.2}
    (alone,) = run(values | {"methods": [method]})
    (_, second) = run(values | {"methods": [method], "rates": [1e-3, 1e-2], "output": str(tmp_path / "two")})
    assert alone.id == second.id
    assert same_weights(weights(alone, values["output"]), weights(second, str(tmp_path / "two")))


def test_rows_are_measured_in_their_order_and_all_of_them(sums: Values, here: list[str], tmp_path: Path):
    """Verdicts pair the rows of trials; both arguments are about training."""
    extra = {"train_sampling_strategy": "group_by_length", "dataloader_drop_last": True}
    sums = sums | {"methods": sums["methods"][1:]}
    (plain,) = run(sums)
    grouped = sums | {"training": sums["training"] | {"extra": extra}, "seeds": [0, 1], "output": str(tmp_path / "g")}
    assert len(plain.weights or []) == 9
    assert len(set(plain.weights or [])) == 3
    for line in run(grouped):
        assert line.status == "done"
        assert line.weights == plain.weights


# --- choosing -----------------------------------------------------------------------------------------------------------


def test_halving_ends_as_the_whole_run(values: Values, here: list[str], tmp_path: Path):
    values = values | {"methods": [values["methods"][1]], "rates": [1e-2, 3e-3, 1e-5], "seeds": [0, 1]}
    lines = run(values | {"search": {"halving": {"keep": 0.5, "rungs": 3}}})
    assert [line.rung for line in lines] == [0, 0, 0, 1, 1, None, None]
    assert [line.steps for line in lines] == [2, 2, 2, 4, 4, 8, 8]
    assert [line.seed for line in lines] == [0, 0, 0, 0, 0, 0, 1]
    for line in lines[:5]:
        assert line.test is line.items is None
        assert line.validation is not None
    logged = [read_metrics(Path(line.run["output"], "metrics.jsonl")) for line in lines[:3]]
    dropped = min(logged, key=len)
    assert {row["step"] for row in dropped if "test_loss" in row} <= {0}  # test rows had no say
    best = lines[5]
    assert lines[6].rate == best.rate
    grid = run(values | {"rates": [best.rate], "seeds": [0], "output": str(tmp_path / "grid")})[0]
    assert (grid.id, grid.test, grid.items, grid.validation, grid.before) == (
        best.id, best.test, best.items, best.validation, best.before,
    )  # fmt: skip
    assert grid.curve["loss"] == best.curve["loss"]
    assert same_weights(weights(grid, str(tmp_path / "grid")), weights(best, values["output"]))
    # Its trial has ended, and at the rung it would be held against others that are at a quarter of their steps
    halved = values | {"search": {"halving": {"keep": 0.5, "rungs": 3}}, "output": str(tmp_path / "grid")}
    with pytest.raises(FolderError, match=r"search: trials in '.*grid' may be past the rungs that it asks for now"):
        run(halved)


def test_a_rung_whose_line_was_lost(values: Values, here: list[str]):
    values = values | {"methods": values["methods"][:1], "rates": [1e-2, 1e-5], "search": {"halving": {"rungs": 2}}}
    lines = run(values)
    path = Path(values["output"], "trials.jsonl")
    lost = next(line for line in lines[:2] if line.rate != lines[2].rate)
    path.write_text("".join(line.to_json() + "\n" for line in lines if line.id != lost.id))
    again = next(line for line in run(values) if line.id == lost.id)
    assert (again.steps, again.validation, again.curve) == (lost.steps, lost.validation, lost.curve)
    assert same_weights(weights(again, values["output"]), weights(lost, values["output"]))


def fake(file: CompareFile, rate: float, seed: int, validation: float | None, until: float = 1.0) -> TrialLine:
    line = make(ENTRY, file, rate, seed, until, 0.0).line
    status = "done" if validation is not None else "diverged"
    return TrialLine(**{**vars(line), "status": status, "validation": validation})


ENTRY = Entry("LoRA", "all", {"name": "peft:lora", "r": 2})


def test_search_seeds_choose_the_rate_for_the_others(values: Values):
    file = parse(values | {"rates": [1e-3, 2e-3, 5e-3], "seeds": [0, 1, 2], "search_seeds": [0]})
    trials, later = wanted(ENTRY, file, {})
    assert ([t.line.rate for t in trials], later) == ([1e-3, 2e-3, 5e-3], 2)
    lines = [fake(file, 1e-3, 0, 0.7), fake(file, 2e-3, 0, 0.8), fake(file, 5e-3, 0, None)]
    trials, later = wanted(ENTRY, file, {line.id: line for line in lines})
    assert ([(t.line.rate, t.line.seed) for t in trials[3:]], later) == ([(2e-3, 1), (2e-3, 2)], 0)


def test_the_smaller_loss_wins_and_a_rate_that_fails_once_does_not(values: Values):
    overrides = ["rates=[1e-3, 2e-3, 5e-3, 1e-2]", "seeds=[0, 1]", "search_seeds=[0, 1]", "training.metric=loss"]
    file = parse(values | {"search": {"halving": {"keep": 0.5, "rungs": 2}}}, overrides)
    scores = {1e-3: (0.7, 0.7), 2e-3: (0.1, None), 5e-3: (0.5, 0.6), 1e-2: (0.8, 0.9)}
    lines = [fake(file, rate, seed, v, 0.5) for rate, pair in scores.items() for seed, v in enumerate(pair)]
    trials, _ = wanted(ENTRY, file, {line.id: line for line in lines})
    assert {t.line.rate for t in trials[8:]} == {5e-3, 1e-3}


def test_the_other_seeds_run_at_the_rate_that_the_report_chooses(values: Values):
    file = parse(values | {"rates": [1e-3, 2e-3], "seeds": [0, 1, 2, 3], "search_seeds": [0, 1, 2]})
    scores = {1e-3: (0.3, 0.2, 0.1), 2e-3: (0.1, 0.2, 0.3)}  # a tie, of which sum() makes 0.6 and 0.6000000000000001
    lines = [fake(file, rate, seed, v) for rate, some in scores.items() for seed, v in enumerate(some)]
    trials, _ = wanted(ENTRY, file, {line.id: line for line in lines})
    (group,) = selection.contenders(lines)
    chosen = selection.choose(group, greater_is_better=True)
    assert chosen is not None
    assert [(t.line.rate, t.line.seed) for t in trials[6:]] == [(chosen.best, 3)] == [(1e-3, 3)]


def test_when_all_rates_fail_nothing_follows(values: Values):
    file = parse(values | {"seeds": [0, 1], "search_seeds": [0]})
    line = fake(file, 0.01, 0, None)
    trials, later = wanted(ENTRY, file, {line.id: line})
    assert (len(trials), later) == (1, 0)


# --- what goes wrong ----------------------------------------------------------------------------------------------------


def test_failures_are_lines(values: Values, here: list[str], monkeypatch: pytest.MonkeyPatch):
    values = values | {"rates": [1e-2, 1e30]}
    broken = {"LoRA": True}
    ranks = trial_module._ranks

    def fails(adapter: Path, parameters: dict[str, int]) -> dict[str, Any]:
        if broken["LoRA"] and "lora" in (adapter / "adapter_config.json").read_text().lower().split("peft_type")[1][:9]:
            raise RuntimeError("the disk is gone")
        return ranks(adapter, parameters)

    monkeypatch.setattr(trial_module, "_ranks", fails)
    found = {(line.label, line.rate): line for line in run(values)}
    assert found["LoRA", 1e-2].status == "failed"
    assert found["LoRA", 1e-2].reason == "the disk is gone"
    assert found["LoRA", 1e-2].test is None
    assert found["RaSA", 1e-2].status == "done"
    assert found["LoRA", 1e30].status == found["RaSA", 1e30].status == "diverged"
    assert "learning" in str(found["RaSA", 1e30].reason)
    assert len(here) == 4
    run(values)
    assert len(here) == 4
    broken.clear()
    broken["LoRA"] = False
    assert {line.id: line.status for line in run(values, retry_failed=True)}[found["LoRA", 1e-2].id] == "done"
    assert len(here) == 5  # the diverged ones did what they do


def test_a_trial_that_dies(values: Values, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    lines = run(values)
    assert [line.status for line in lines] == ["failed", "failed"]
    assert str(lines[0].reason).startswith("its process ended with exit code 1; see ")


def test_data_without_what_a_comparison_needs(values: Values, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    source = Path(values["data"]["source"])
    (source / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"data.test: there are no test rows, .* hold some out: test: 0.1"):
        run(values)
    (source / "validation.jsonl").write_text("")
    path = tmp_path / "compare.yaml"
    path.write_text(parse(values).to_yaml())
    assert main(["compare", str(path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not Path(values["output"]).exists()


def test_who_cannot_run_is_recorded(values: Values, here: list[str]):
    where = {"outside": {"layers": [7]}, "first": {"layers": "first third"}}
    lines = run(values | {"methods": values["methods"][:1], "where": where})
    assert {line.where: line.status for line in lines} == {"outside": "failed", "first": "done"}
    assert lines[0].reason == "where: layers: 7 is not a layer; the model has layers 0 to 2"
    assert len(here) == 1
    with pytest.raises(
        ValueError,
        match=r"no contender can be trained: rasa: method\.target_modules: no module of the model is called 'nothing'",
    ):
        run(values | {"methods": [{"name": "rasa", "target_modules": ["nothing"]}], "output": values["output"] + "2"})


# --- where, budget ------------------------------------------------------------------------------------------------------


def test_places(values: Values, capsys: pytest.CaptureFixture[str]):
    attention = ["query", "key", "value"]
    where = {
        "first": {"layers": "first third"}, "last": {"layers": "last third"}, "attention": {"target_modules": attention},
        "attention in 1, 2": {"target_modules": attention, "layers": [1, 2]},
    }  # fmt: skip
    file = parse(values | {"methods": values["methods"][:1], "where": where})
    entries = {e.where: e for e in resolve(file).entries}
    assert entries["first"].method["layers_to_transform"] == [0]
    assert entries["last"].method["layers_to_transform"] == [2]
    assert entries["first"].method["target_modules"] == ["dense", "key", "query", "value"]
    assert entries["first"].trained == entries["last"].trained == 2 * (4 * 32 + 2 * 48)
    assert entries["attention"].trained == 2 * 3 * 3 * 32
    assert entries["attention in 1, 2"].trained == 2 * 2 * 3 * 32
    print_plan(resolve(file), file)
    assert "4 trials of at most 8 steps; 32 train, 8 validation, 9 test rows" in capsys.readouterr().out
    assert not Path(values["output"]).exists()


def test_a_budget_is_met_in_every_place(values: Values, here: list[str]):
    where = {"all": {}, "first": {"layers": "first third"}}
    methods = [{"name": "peft:lora", "label": "LoRA"}, {"name": "rasa", "shared_rank": 1}]
    file = parse(values | {"methods": methods, "where": where, "budget": {"of": {"name": "peft:lora", "r": 4}}})
    lineup = resolve(file)
    whole = 4 * (3 * (4 * 32 + 2 * 48) + 32)
    assert lineup.budget == whole
    found = {e.name(): e for e in lineup.entries}
    assert found["LoRA"].method["r"] == 4
    assert found["LoRA"].trained == whole
    assert found["LoRA, first"].method["r"] == whole // (4 * 32 + 2 * 48)  # a third of the layers, three times the rank
    for entry in lineup.entries:
        assert entry.trained is not None
        assert 0.7 * whole < entry.trained <= whole
    lines = run(values | {"methods": methods, "budget": 1500})
    assert [line.config["r"] for line in lines] == [2, 2]
    assert all((line.parameters["trained"] or 0) <= 1500 for line in lines)
    with pytest.raises(ValueError, match=r"no contender can be trained: LoRA: .*budget is 100"):
        resolve(parse(values | {"methods": methods[:1], "budget": 100}))


@pytest.mark.parametrize(("budget", "built"), [(None, 2), ({"of": {"name": "peft:lora", "r": 2}}, 1)])
def test_a_contender_is_counted_once(budget: Any, built: int, values: Values, monkeypatch: pytest.MonkeyPatch):
    adapted, counted = contenders._Bench.adapted, []

    def spy(bench: Any, method: Values) -> Any:
        counted.append(method["name"])
        return adapted(bench, method)

    monkeypatch.setattr(contenders._Bench, "adapted", spy)
    lineup = resolve(parse(values | {"budget": budget}))
    assert all(entry.trained for entry in lineup.entries)
    assert len(counted) == built  # at a budget the solver has counted the contenders already


def test_layers_beside_a_regex(values: Values):
    file = parse(values | {"targets": ".*query", "where": {"first": {"layers": [0]}}})
    with pytest.raises(ValueError, match=r"layers cannot be chosen beside the regex '\.\*query'"):
        resolve(file)


def test_no_layer_is_not_all_layers(sums: Values):
    """Of two layers; PEFT takes an empty list for all."""
    methods = [{"name": "peft:lora", "label": "LoRA", "r": 2}]
    with pytest.raises(ValueError, match=r"LoRA, middle: where: layers: of 2 layers the middle third is empty; give"):
        resolve(parse(sums | {"methods": methods, "where": {"middle": {"layers": "middle third"}}}))


def test_layers_that_share_their_modules(values: Values, bert: Path, tmp_path: Path):
    """ALBERT's first third would be all of its layers."""
    sizes: Values = {"hidden_size": 16, "embedding_size": 8, "intermediate_size": 32, "num_attention_heads": 2}
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "albert")
    vocabulary = len(AutoTokenizer.from_pretrained(bert))
    AlbertModel(AlbertConfig(vocab_size=vocabulary, **sizes, num_hidden_layers=3)).save_pretrained(tmp_path / "albert")
    file = parse(values | {"model": str(tmp_path / "albert"), "where": {"first": {"layers": "first third"}}})
    with pytest.raises(ValueError, match=r"where: layers: the 3 layers of the model share modules; none can be chosen"):
        resolve(file)


def test_the_estimate_says_what_it_does_not_know(values: Values):
    file = parse(values | {"seeds": [0, 1]})
    other = Entry("RaSA", "all", {"name": "rasa"})
    trials = [t for e in (ENTRY, other) for t in wanted(e, file, {})[0]]
    estimate = Estimate()
    assert estimate.words(trials, 0, 1) == ""
    estimate.add(trials[0], 60.0)
    assert estimate.words(trials[1:], 0, 1) == "at least 3 min left (1 contender was not timed yet)"
    estimate.add(trials[2], 120.0)
    assert estimate.words([trials[1], trials[3]], 0, 1) == "about 3 min left"
    assert estimate.words([trials[1], trials[3]], 0, 3) == "about 60 s left"
    assert estimate.words([trials[1]], 4, 1) == "about 5 min to 9 min left"
