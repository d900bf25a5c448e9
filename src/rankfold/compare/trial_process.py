"""One trial in a process of its own: `python -m rankfold.compare.trial_process FOLDER`.

Reads FOLDER/trial.json, trains in FOLDER/run and writes the trial's line to FOLDER/<id>.json. It lives as long as its standard
input: when whoever started it is gone, so is the trial, with all processes that it started, on any machine.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import sys
import threading
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankfold.compare.trial_file import TrialLine

if TYPE_CHECKING:
    from rankfold.runfile.schema import RunFile
    from rankfold.train.trainers import CarefulTrainer

JOB = "trial.json"


def main(folder: Path) -> int:
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    line = TrialLine(**job["line"])
    began = time.monotonic()
    try:
        measured = measure(line, folder, job["until"])
    except Exception as e:
        from rankfold.train.trainers import DivergedError

        traceback.print_exc()
        status = "diverged" if isinstance(e, DivergedError) else "failed"
        measured = replace(line, status=status, reason=_sentence(e), **machine())
    if int(os.environ.get("RANK", 0)) == 0:
        from rankfold.io.files import write_whole

        measured = replace(measured, wall_seconds=time.monotonic() - began)
        write_whole(folder / f"{line.id}.json", measured.to_json())
    return 0


def _end_with_the_parent() -> None:
    # The file descriptor and not sys.stdin, whose lock would be held when the interpreter ends.
    while os.read(0, 1024):
        pass
    os._exit(1)


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | OSError) and text:
        return text[:500]
    return f"{type(error).__name__}: {text}"[:500]


def machine() -> dict[str, Any]:
    """The machine and versions that the trial was measured on."""
    import torch

    from rankfold.train.card import versions

    return {"versions": versions(), "threads": torch.get_num_threads(), "host": platform.node()}


def measure(line: TrialLine, folder: Path, until: float) -> TrialLine:
    """Trains the trial up to a share of its steps and measures it: at its end on test rows, before that on validation rows only.

    Raises:
        DivergedError: the loss or the metric is not finite. And what `train` raises.
    """
    from accelerate.utils import gather_object

    from rankfold.runfile.load import parse
    from rankfold.train.callbacks import StopAt
    from rankfold.train.run import evaluate, train
    from rankfold.train.scores import RowScores
    from rankfold.train.trainers import DivergedError

    run = parse(line.run)
    output = Path(run.output)
    if output.exists() and not (output / "run.yaml").exists():
        shutil.rmtree(output)  # it was killed before it began
    found: dict[str, RowScores] = {}
    before = _Kept(folder.parent / f"before-{_without_rate(line)}.json")

    def look(trainer: CarefulTrainer, split: str, rows: Any) -> dict[str, float]:
        first = trainer.state.global_step == 0
        if split == "test" and not first and until < 1:
            return {}  # test rows are looked at when there is nothing left to choose
        if first and all(
            gather_object([before.read() is not None])
        ):  # of every process: another trial may just write it
            return {}
        metrics = evaluate(trainer, split, rows)
        scores = trainer.row_scores[run.metric]
        if first:
            before.write(scores.mean)
        else:
            found[split] = scores
        return metrics

    stop = [StopAt(until)] if until < 1 else []
    result = train(run, resume=True, also=["validation"], measure=look, callbacks=stop, command=line.command)
    for split, scores in found.items():
        if not math.isfinite(scores.mean):
            raise DivergedError(f"{run.metric} on {split} rows is {scores.mean}; try a smaller learning rate")
    test = found.get("test")
    made = result.steps - (result.resumed_at or 0)
    parameters = {"trained": result.adapter, "head": result.head, "stored": result.stored}
    parameters |= {} if result.live is None else {"live": result.live}
    return replace(
        line,
        status="done",
        reason=None,
        validation=found["validation"].mean,
        test=test and test.mean,
        before=before.read(),
        items=test and test.items,
        weights=test and test.weights,
        curve=curve(run),
        steps=result.steps,
        seconds=result.seconds / made * result.steps if made else None,
        tokens_per_second=result.tokens_per_second or None,
        peak_bytes=result.peak_memory,
        # Of a relative output, an executor may give the folder's absolute path
        adapter=Path(os.path.relpath(result.adapter_path, folder.parent.parent)).as_posix(),
        **_ranks(result.adapter_path, parameters),
        **machine(),
    )


def curve(run: RunFile) -> dict[str, list[list[float]]]:
    """The training loss and the validation metric over the steps."""
    from rankfold.tasks import table as tasks
    from rankfold.train.metrics import read_metrics

    rows = read_metrics(Path(run.output, "metrics.jsonl"))
    keys = {"loss": "loss", "validation": f"eval_{tasks.get(run.task).logged_as(run.metric)}"}
    return {name: [[row["step"], row[key]] for row in rows if key in row] for name, key in keys.items()}


def _ranks(adapter: Path, parameters: dict[str, int]) -> dict[str, Any]:
    """What a plain LoRA of the adapter takes: of one rank for all modules, and of just the components that are left."""
    from rankfold.inspect import inspect_adapter

    try:
        updates = inspect_adapter(adapter).updates
    except ValueError:  # no pair of factors, such as DoRA
        return {"parameters": parameters | {"folded": None, "folded_rank": None}}
    rank = max(u.rank for u in updates)
    return {
        "parameters": parameters | {"folded": rank * sum(u.out + u.into for u in updates), "folded_rank": rank},
        "kept": sum(u.rank * (u.out + u.into) for u in updates),
        "ranks": {u.module: u.rank for u in updates},
    }


def _without_rate(line: TrialLine) -> str:
    """What the score before training depends on: all that defines the trial, less its learning rate."""
    from rankfold.compare.trial_list import hash_of

    training = {k: v for k, v in line.run["training"].items() if k != "learning_rate"}
    return hash_of({k: v for k, v in line.run.items() if k != "output"} | {"training": training}, None)


@dataclass(frozen=True)
class _Kept:
    """The score before training, which a trial that resumes still needs, and the same contender's at other rates."""

    path: Path

    def write(self, value: float) -> None:
        from rankfold.io.files import write_whole

        write_whole(self.path, json.dumps(value))

    def read(self) -> float | None:
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
