"""The sparsifying schedule of SoRA (Algorithm 1 of arXiv 2311.11696): from dense to ever sparser, one adapter a stage.

    stages = sparsify(load("run.yaml"), thresholds(0.0, 7e-4, 7))

Every stage trains with the next threshold from where the stage before ended, and is kept; its non-zero parameters against the
metric on training and validation rows are the curve of memorisation and generalisation. A deviation from the released code, whose
later stages run at learning rate 0 because the exhausted scheduler is used again: here every stage has a new one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rankfold.errors import RankfoldError
from rankfold.host import registry
from rankfold.inspect import inspect_adapter
from rankfold.io.files import write_whole
from rankfold.runfile.load import parse
from rankfold.runfile.methods import config_class
from rankfold.runfile.problems import Problem, RunFileError
from rankfold.runfile.schema import RunFile
from rankfold.tasks.rows import DataError
from rankfold.text import decimals
from rankfold.train import folder
from rankfold.train.data import load_rows
from rankfold.train.plot import INK, TRAIN, VALIDATION, save_figure
from rankfold.train.run import train

FILES = ("stages.jsonl", "stages.png", "stages.svg")


@dataclass(frozen=True)
class Stage:
    """What one threshold left.

    Args:
        threshold: ξ of this stage.
        steps: optimiser steps of this stage.
        nonzero: Σ rank·(in + out) of the components whose gate is not zero.
        rank: those components, of all modules together.
        of: components that the adapter began with.
        train, validation: metrics after the stage, by name.
        adapter: its folder.
    """

    threshold: float
    steps: int
    nonzero: int
    rank: int
    of: int
    train: dict[str, float]
    validation: dict[str, float]
    adapter: str


def thresholds(first: float, last: float, count: int, kind: str = "linear") -> list[float]:
    """The increasing values of a sparsifying schedule (Algorithm 1's ξ).

    Args:
        first, last, count: ends and number of stages, ends included.
        kind: "linear", "log_linear" (log of equal steps of exp ξ) or "exp_linear" (geometric; first > 0).

    Raises:
        ValueError: a kind, count or range that makes no schedule.
    """
    if count < 2 or last <= first or first < 0:
        raise RankfoldError(
            f"thresholds: first={first}, last={last}, count={count} need 0 <= first < last and count >= 2"
        )
    steps = [i / (count - 1) for i in range(count)]
    if kind == "linear":
        return [first + (last - first) * s for s in steps]
    if kind == "log_linear":
        return [math.log(math.exp(first) + (math.exp(last) - math.exp(first)) * s) for s in steps]
    if kind == "exp_linear":
        if first <= 0:
            raise RankfoldError(f"thresholds: first={first} must be > 0 for a geometric schedule")
        return [first * (last / first) ** s for s in steps]
    raise RankfoldError(f'thresholds: kind={kind!r} must be "linear", "log_linear" or "exp_linear"')


def sparsify(
    run: RunFile,
    schedule: Sequence[float],
    *,
    stage_epochs: float | None = None,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> list[Stage]:
    """Runs the schedule; every stage is a run of its own in `output/stage-<number>`.

    Args:
        run: a run file of a method whose config says what makes it sparser (`sparser_with`); its output is the folder of
            all stages.
        schedule: the values of that field, increasing, as `thresholds` gives them.
        stage_epochs: of every stage after the first; by default as long as the first.
        resume: go on where a killed schedule stopped; finished stages are not repeated.
        overwrite: delete earlier stages first.

    Raises:
        RunFileError: a method without a threshold. DataError: no validation rows. And what `train` raises.
    """
    swept = getattr(config_class(run.method.name), "sparser_with", None)
    if swept is None:
        able = ", ".join(row.name for row in registry.find() if row.config.sparser_with)
        raise RunFileError([Problem(("method", "name"), f"'{run.method.name}' has no threshold to raise; use {able}")])
    if list(schedule) != sorted(set(schedule)):
        raise RankfoldError(f"sparsify: the thresholds must increase: {', '.join(f'{xi:g}' for xi in schedule)}")
    rows = load_rows(run)
    if rows["validation"] is None:
        raise DataError("sparsify needs validation rows for its curve; hold some out with data.validation: 0.1")
    output = Path(run.output)
    stages: list[Stage] = []
    if overwrite:
        for name in FILES:
            (output / name).unlink(missing_ok=True)
    for number, xi in enumerate(schedule):
        stage = _stage(run, number, {swept: xi}, stages[-1].adapter if stages else None, stage_epochs)
        done = Path(stage.output, "result.json")
        if not (resume and done.is_file()):
            say(f"stage {number + 1} of {len(schedule)}: threshold {xi:g}")
            train(
                stage,
                resume=resume,
                overwrite=overwrite,
                also=("train", "validation"),
                command="rankfold sparsify",
                say=_silent,
            )
        else:
            folder.check(stage, resume=True, overwrite=False)  # the same run, not another that has the name
            folder.check_rows(Path(stage.output), rows.digests, stage.data)
            folder.check_length(stage)
        stages.append(_read(stage, xi, json.loads(done.read_text(encoding="utf-8"))))
        say(_words(stages[-1], run.metric))
        write_whole(output / "stages.jsonl", "".join(json.dumps(asdict(s)) + "\n" for s in stages))
    title = registry.get(run.method.name).title
    plot_stages(stages, run.metric, f"{title} on {run.model.name}, {run.data.source or run.data.train}", output)
    return stages


def _stage(run: RunFile, number: int, swept: dict[str, float], before: str | None, epochs: float | None) -> RunFile:
    values = run.model_dump(exclude_none=True)
    values["method"] |= swept
    values["training"] |= {"keep_best": False} | ({"start_from": before} if before else {})
    if before and epochs:
        values["training"] = {k: v for k, v in values["training"].items() if k != "max_steps"} | {"epochs": epochs}
    return parse(values | {"output": str(Path(run.output, f"stage-{number}"))})


def _read(stage: RunFile, xi: float, result: dict[str, Any]) -> Stage:
    others = result["others"]
    adapter = Path(stage.output, "adapter")
    found = inspect_adapter(adapter).updates
    return Stage(
        threshold=xi,
        steps=result["steps"],
        nonzero=sum(u.rank * (u.out + u.into) for u in found),
        rank=sum(u.rank for u in found),
        of=sum(u.start for u in found),
        train=others["train"],
        validation=others["validation"],
        adapter=str(adapter),
    )


def _words(stage: Stage, metric: str) -> str:
    return (
        f"  {stage.nonzero:,} parameters left ({stage.rank} of {stage.of} ranks); "
        f"{metric} {decimals(stage.train[metric])} on training, {decimals(stage.validation[metric])} on validation rows"
    )


def plot_stages(stages: Sequence[Stage], metric: str, title: str, output: Path) -> None:
    """Draws stages.png and stages.svg: the metric on training rows (memorisation) and validation rows (generalisation)
    against the non-zero parameters, dense on the left."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.9), layout="constrained")
    axes = figure.add_subplot()
    kept = [s.nonzero / 1000 for s in stages]
    axes.plot(kept, [s.train[metric] for s in stages], "o-", color=TRAIN, label="training rows (memorisation)")
    axes.plot(
        kept, [s.validation[metric] for s in stages], "s-", color=VALIDATION, label="validation rows (generalisation)"
    )
    for s, x in zip(stages, kept, strict=True):
        axes.annotate(
            f"ξ {s.threshold:g}",
            (x, s.train[metric]),
            (0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color=INK,
        )
    axes.invert_xaxis()
    axes.margins(0.08, 0.12)
    axes.set_xlabel("non-zero parameters of the adapter, thousands")
    axes.set_ylabel(metric.replace("_", " "))
    axes.set_title(title, fontsize=11, loc="left", parse_math=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, output / "stages")


def _silent(sentence: str) -> None:
    pass
