"""The same trials in processes of this machine, on a Ray cluster, and on several devices."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from rankfold.compare.contenders import resolve
from rankfold.compare.executors import executor, run_process
from rankfold.compare.experiment import compare
from rankfold.compare.file import parse
from rankfold.compare.trial_file import TrialLine, read
from rankfold.compare.trial_list import make
from rankfold.compare.trial_process import JOB, measure
from rankfold.train.folder import FolderError

Values = dict[str, Any]
LINE = TrialLine(id="a", label="x", method="lora", rate=1e-3, seed=0, status="failed", config={}, run={},
                     metric="loss", greater_is_better=False)  # fmt: skip
MEASURED_TIMES = {"seconds", "wall_seconds", "tokens_per_second", "peak_bytes", "host", "run"}


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))


def lines(values: Values, name: str, tmp_path: Path, **options: Any) -> list[TrialLine]:
    said: list[str] = []
    return read(compare(parse(values | {"output": str(tmp_path / name)}), say=said.append, **options))


def same(a: TrialLine, b: TrialLine) -> bool:
    one, other = ({k: v for k, v in asdict(x).items() if k not in MEASURED_TIMES} for x in (a, b))
    return one == other


def test_processes_measure_what_one_process_does(values: Values, here: list[str], tmp_path: Path, monkeypatch: Any):
    inside = {line.id: line for line in lines(values, "here", tmp_path)}
    monkeypatch.undo()
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    found = lines(values, "processes", tmp_path, workers=2)
    assert len(found) == 2
    assert all(same(line, inside[line.id]) for line in found)
    log = next((tmp_path / "processes").glob("trials/*/log.txt")).read_text()
    assert "step 8/8" in log


# Ray reads its files and closes its sockets when it likes.
@pytest.mark.filterwarnings("default")
def test_ray_gives_the_same(values: Values, here: list[str], tmp_path: Path, monkeypatch: Any):
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    values |= {"methods": values["methods"][1:]}
    (inside,) = lines(values, "here", tmp_path)
    monkeypatch.undo()
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    (found,) = lines(values, "ray", tmp_path, kind="ray")
    assert found.status == "done", found.reason
    assert same(found, inside)


def test_ray_launches_nothing():
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    with (
        pytest.raises(ValueError, match="launch: trials of several processes"),
        executor("ray", 1, "accelerate launch"),
    ):
        pass


def test_leaving_ends_what_runs(tmp_path: Path):
    """What a launcher started reads our standard input too, and so ends with it."""
    folder = tmp_path / "trial"
    folder.mkdir()
    (folder / JOB).write_text("{}")
    with executor("local", 1, f"sh -c '(cat; echo ended > {tmp_path}/child); true'") as submit:
        running, queued = submit(folder, LINE), submit(folder, LINE)
        while not (folder / "log.txt").exists():
            time.sleep(0.01)
    assert running.result().status == "failed"
    assert queued.cancelled()
    while not (tmp_path / "child").exists():
        time.sleep(0.01)


def test_one_comparison_a_folder(values: Values, tmp_path: Path):
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".lock"),
        pytest.raises(FolderError, match="another `rankfold compare` is at work"),
    ):
        compare(parse(values), say=lambda _: None)


def test_a_relative_output_by_its_absolute_path(values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As Ray's tasks are given the folder."""
    monkeypatch.chdir(tmp_path)
    file = parse(values | {"output": "out", "methods": values["methods"][:1]})
    trial = make(resolve(file).entries[0], file, 0.01, 0, 1.0, 0.0)
    trial.folder.mkdir(parents=True)
    line = measure(trial.line, trial.folder.absolute(), 1.0)
    assert line.adapter == f"trials/{trial.id}/run/adapter"
    assert Path("out", str(line.adapter)).is_dir()


def test_output_that_a_node_does_not_see(tmp_path: Path):
    reason = run_process(tmp_path / "not", LINE, 1, None).reason
    assert "put output on storage that all machines share" in str(reason)


@pytest.mark.slow
def test_two_processes_a_trial(values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rows, half of them on each of two gloo processes, come back whole and in order."""
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    values |= {"rates": [1e-8], "methods": values["methods"][:1], "launch": f"accelerate launch {options}"}
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    values["training"] = values["training"] | {"batch_size": 4, "metric": "loss"}
    (two,) = lines(values, "two", tmp_path)
    assert two.status == "done", (tmp_path / "two").glob("trials/*/log.txt").__next__().read_text()[-3000:]
    result = json.loads(Path(two.run["output"], "result.json").read_text())
    assert result["processes"] == 2
    assert two.items is not None
    assert len(two.items) == 9
    values.pop("launch")
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    values["training"] |= {"batch_size": 8}
    (one,) = lines(values, "one", tmp_path)
    # Hardly trained: dropout draws other masks in each process.
    assert two.items == pytest.approx(one.items, rel=1e-5)
    assert len({round(x, 4) for x in two.items}) > 1  # rows can be told apart, so their order was looked at
    assert two.before == pytest.approx(one.before, rel=1e-5)
    assert two.test == pytest.approx(
        result["after"]["loss"], rel=0.02
    )  # the trainer counts the row that fills up the last batch
