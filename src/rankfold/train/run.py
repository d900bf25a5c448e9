"""One training run: rows and model in, adapter, model card, metrics and picture out.

`train` reads top to bottom: check the folder, prepare, adapt, measure, train, measure, save.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from rankfold.errors import RankfoldError
from rankfold.io.adapters import write_labels
from rankfold.io.files import whole_folder, write_whole
from rankfold.runfile.checks import check
from rankfold.runfile.load import load, parse
from rankfold.runfile.methods import cannot_resume
from rankfold.runfile.problems import RunFileError
from rankfold.runfile.schema import RunFile
from rankfold.tasks.rows import DataError
from rankfold.tasks.task import Task
from rankfold.train import budget, checkpoints, folder, model
from rankfold.train.callbacks import Clock, MetricsFile, StopEarly
from rankfold.train.card import model_card, versions
from rankfold.train.folder import saving
from rankfold.train.hf_api import drop_reference
from rankfold.train.metrics import read_metrics, tidy
from rankfold.train.optimizer import RunOptimizer, describe
from rankfold.train.plot import plot_metrics
from rankfold.train.prepare import Prepared, prepare, processes
from rankfold.train.result import TrainResult
from rankfold.train.trainers import CarefulTrainer, DivergedError, make_trainer

Measure = Callable[[CarefulTrainer, str, Any], dict[str, float]]
"""Trainer, name of the split and its rows in, metrics by name out."""


def train(
    run: RunFile | str | Path | Mapping[str, Any],
    *overrides: str,
    resume: bool = False,
    overwrite: bool = False,
    command: str = "",
    also: Sequence[str] = (),
    further: Mapping[str, Any] | None = None,
    measure: Measure | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    say: Callable[[str], None] = print,
) -> TrainResult:
    """Train as the run file says.

    Args:
        run: the path of a run file, its values as a dictionary, or what `runfile.load` made of them.
        overrides: such as "training.seed=1"; of a path or a dictionary.
        resume: continue from the last whole checkpoint in the output folder; start if there is none.
        overwrite: delete an earlier run in the output folder first.
        command: how the run was started, for the model card.
        also: further splits whose rows are measured after training, such as "train".
        further: rows of other runs, as the trainer takes them, that are measured after training too; by a name.
        measure: takes the place of `evaluate` before and after training, to look at more than it returns.
        callbacks: further callbacks of the trainer.
        say: takes each sentence for the reader (on the main process only).

    Raises:
        RunFileError, FolderError, DataError, ModelError: before anything is written.
        DivergedError: the loss is not a number. SaveError: a checkpoint cannot be written.
    """
    state = processes()
    say = say if state.is_main_process else _silent
    measure = measure or evaluate
    run = _read(run, overrides)
    folder.check(run, resume=resume, overwrite=overwrite)
    output = Path(run.output)

    set_seed(run.training.seed)
    prepared = prepare(run)
    rows = prepared.rows
    if rows["validation"] is None and run.training.early_stopping:
        raise DataError("training.early_stopping needs validation rows; hold some out with data.validation: 0.1")
    if rows.class_counts:
        say(f"classes (and training {rows.counted} of each): {rows.classes_in_words()}")
    for note in rows.notes:
        say(note)
    checkpoint, damaged = checkpoints.last_whole(output / "checkpoints") if resume else (None, [])
    for sentence in damaged:
        say(sentence)
    if checkpoint and cannot_resume(run.method.name, run.method.fields):
        say(f"{checkpoint.name} is left alone: PEFT keeps in none what '{run.method.name}' chooses its ranks by")
        checkpoint = None
    if checkpoint:
        folder.check_rows(output, rows.digests, run.data)
        for note in checkpoints.other_processes(checkpoint, state.num_processes):
            say(note)
            rows.notes.append(note)
    if resume:
        say(f"resuming from {checkpoint}" if checkpoint else "no whole checkpoint to resume from: starting at step 0")

    set_seed(run.training.seed)  # the new weights depend on the seed alone, not on what the rows drew
    base, new_modules = model.load_model(run, prepared.place, prepared.config)
    adapted = model.adapt(base, prepared.peft_config, new_modules, prepared.processor)
    if run.training.start_from is not None:
        for sentence in model.start_from(adapted, Path(run.training.start_from), rows.labels):
            say(sentence)
    optimizer = RunOptimizer.of(run, adapted)
    spent = budget.count(adapted)
    share = spent.trainable / (spent.base + spent.trainable)
    say(
        f"{run.method.name} on {run.model.name}: {spent.trainable:,} of {spent.base + spent.trainable:,} parameters ({share:.2%})"
    )
    if optimizer is not None:
        say(f"optimiser: {describe(run.training, prepared.arguments['max_grad_norm'], optimizer)}")
    clock = Clock()
    trainer = make_trainer(prepared, adapted, [clock, *callbacks], optimizer)

    # Nothing was written up to here.
    metrics_file: MetricsFile | None = None
    resume_at = int(checkpoint.name.rpartition("-")[2]) if checkpoint else None
    if state.is_main_process:
        if overwrite:
            folder.clear(output)
        output.mkdir(parents=True, exist_ok=True)
        write_whole(output / "run.yaml", run.to_yaml(command or "rankfold.train.run.train"))
        folder.write_rows(output, rows.digests)
        metrics_file = MetricsFile(output / "metrics.jsonl", resume_at)
        trainer.add_callback(metrics_file)
    state.wait_for_everyone()

    split, measured = measured_split(prepared)
    first = _MeasureFirst(lambda: measure(trainer, split or "", measured))
    if checkpoint:
        first.scores = _recorded(output / "metrics.jsonl", split, prepared.task)
    elif measured is not None:
        say(f"measuring on {len(measured):,} {split} rows before training")
        trainer.add_callback(first)
    if run.training.early_stopping:
        trainer.add_callback(StopEarly(run.training.early_stopping))
        trainer.args.restore_callback_states_from_checkpoint = True
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except FloatingPointError as e:  # a schedule of ranks saw it before the loss did
        raise DivergedError(str(e)) from e
    if resume_at is not None and resume_at > trainer.state.max_steps:
        note = f"the run had made {resume_at:,} steps already, more than the {trainer.state.max_steps:,} asked for now; none was made"
        say(note)
        rows.notes.append(note)
    after = measure(trainer, split, measured) if split else {}
    if metrics_file is not None:
        metrics_file.close()
    others = {name: prepared.for_trainer(name) for name in also if rows[name] is not None} | dict(further or {})
    others = {name: measure(trainer, name, found) for name, found in others.items()}

    drop_reference(adapted)
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    rows_a_step = run.training.batch_size * run.training.gradient_accumulation * state.num_processes
    main, adapter = state.is_main_process, output / "adapter"
    with saving(adapter), whole_folder(adapter, force=True) if main else nullcontext(adapter) as partial:
        trainer.save_model(str(partial))  # every process: a sharded model is gathered here
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody needs to open
        ranks, ranks_at_start = budget.ranks(adapted)
        stored, stored_bytes = budget.stored(partial) if main else (0, 0)
        result = TrainResult(
            output=str(output),
            model=run.model.name,
            task=run.task,
            method={"name": run.method.name, **run.method.fields},
            metric=run.metric,
            measured_on=split or "",
            before=first.scores,
            after=after,
            others=others,
            total=spent.base + spent.trainable,
            trainable=spent.trainable,
            adapter=spent.adapter,
            head=spent.head,
            live=spent.live,
            stored=stored,
            stored_bytes=stored_bytes,
            ranks=ranks,
            ranks_at_start=ranks_at_start,
            processes=state.num_processes,
            steps=trainer.state.global_step,
            epochs=float(trainer.state.epoch or 0),
            best_step=int(best.rpartition("-")[2]) if best else None,
            resumed_at=resume_at,
            seconds=clock.seconds,
            samples_per_second=clock.steps * rows_a_step / clock.seconds if clock.seconds else 0.0,
            tokens_per_second=clock.tokens / clock.seconds if clock.seconds else 0.0,
            peak_memory=_peak_memory(),
            labels=rows.labels,
            notes=rows.notes,
            command=command,
            versions=versions(),
        )
        if main:
            write_labels(rows.labels, partial)
            (partial / "README.md").write_text(model_card(prepared, result), encoding="utf-8")
    if main:
        write_whole(output / "result.json", json.dumps(asdict(result), indent=2) + "\n")
        title = f"{run.method.name} on {run.model.name}, {run.data.source or run.data.train}"
        logged = read_metrics(output / "metrics.jsonl")
        plot_metrics(logged, prepared.task.logged_as(run.metric), title, output, result.best_step)
    state.wait_for_everyone()
    return result


def _read(run: RunFile | str | Path | Mapping[str, Any], overrides: Sequence[str]) -> RunFile:
    if not isinstance(run, RunFile):
        return parse(dict(run), overrides) if isinstance(run, Mapping) else load(run, overrides)
    if overrides:
        raise RankfoldError(f"train: {overrides[0]!r} overrides a run file that is read already; give train its path")
    if problems := check(run):
        raise RunFileError(problems)
    return run


class _MeasureFirst(TrainerCallback):
    """Measures when training begins.

    Not before it: transformers 5.23 would prepare the model for evaluation only, and then several processes would each
    train a copy of their own without a word.
    """

    def __init__(self, measure: Callable[[], dict[str, float]]):
        self.measure = measure
        self.scores: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.random.fork_rng(
            devices=[]
        ):  # a data loader draws a seed; training must not depend on whether this was measured
            self.scores = self.measure()


def _silent(sentence: str) -> None:
    pass


def measured_split(prepared: Prepared) -> tuple[str | None, Any]:
    """The rows for the scores before and after: test, else validation (which also chose the checkpoint), else none."""
    split = next((name for name in ("test", "validation") if prepared.rows[name] is not None), None)
    return split, prepared.for_trainer(split) if split else None


def _prefix(split: str) -> str:
    return "test" if split == "test" else "eval"


def evaluate(trainer: CarefulTrainer, split: str, measured: Any) -> dict[str, float]:
    """The metrics of a split's rows, by name."""
    return tidy(trainer.evaluate(measured, metric_key_prefix=_prefix(split)), _prefix(split), trainer.task)


def _recorded(metrics: Path, split: str | None, task: Task) -> dict[str, float]:
    """The scores before training, as the interrupted run wrote them down."""
    first = [row for row in read_metrics(metrics) if row["step"] == 0 and split and f"{_prefix(split)}_loss" in row]
    return tidy(first[0], _prefix(split or ""), task) if first else {}


def _peak_memory() -> int:
    """Bytes: of the accelerator while training, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
