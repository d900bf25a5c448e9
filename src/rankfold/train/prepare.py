"""What a run will do, before it does it: parameters, steps, tokens and memory, without loading a weight."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState

from rankfold.host.config import LowRankConfig
from rankfold.host.unreached import in_words, unreached
from rankfold.io.models import locate
from rankfold.runfile.arguments import trainer_arguments
from rankfold.runfile.checks import peft_config
from rankfold.runfile.schema import RunFile
from rankfold.tasks import table
from rankfold.tasks.rows import Encoded, Rows
from rankfold.tasks.task import Task
from rankfold.text import size
from rankfold.train import budget, model, tokens
from rankfold.train.budget import Budget
from rankfold.train.data import load_rows
from rankfold.train.optimizer import RunOptimizer, describe

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedConfig


def processes() -> PartialState:
    """This process among those of `accelerate launch`."""
    # Without an accelerator accelerate only looks for the others (gloo) when told that this is meant.
    return PartialState(cpu=not torch.accelerator.is_available())


@dataclass
class Prepared:
    """Everything of a run but its weights, each built once.

    Args:
        place: what `from_pretrained` takes for the model.
        processor: the tokenizer, or what the task has instead.
        encoded: the splits of `rows` as the trainer takes them.
        max_length: of a row in tokens; None for rows that are not tokens.
        peft_config: of the adapter; `adapt` changes it.
        arguments: of the trainer, without `training.extra`.
    """

    run: RunFile
    task: Task
    place: str
    config: PreTrainedConfig
    processor: Any
    rows: Rows
    encoded: dict[str, Encoded]
    max_length: int | None
    peft_config: PeftConfig
    arguments: dict[str, Any]

    def for_trainer(self, split: str) -> Any:
        """A split as its trainer takes it, or None."""
        return self.encoded[split].rows if split in self.encoded else None


def prepare(run: RunFile) -> Prepared:
    """Find and check the model's config and tokenizer and the rows.

    Raises:
        ModelError, DataError: what does not fit, and the fix.
    """
    task = table.get(run.task)
    config_of_adapter = peft_config(run)
    place = locate(run.model.name)
    with processes().main_process_first():  # the others find the caches filled
        head, known = model.known_classes(run, place)
        rows = load_rows(run, known)
        rows.notes += model.check_order(rows.labels, known, head)
        config = model.load_config(run, place, rows.labels)
        processor = model.load_processor(run, place)
        max_length = tokens.longest_row(run, config, processor)
        encoded = {split: task.encode(rows, split, processor, max_length, run.data) for split in rows.splits}
    kept = run.training.extra.get("truncation_mode", "keep_start")
    encoded = {s: tokens.without_unlearnable(run, rows, s, found, max_length, kept) for s, found in encoded.items()}
    if max_length is not None:
        tokens.note_cut_off(rows, {split: found.longest for split, found in encoded.items()}, max_length)
    note_idle_schedule(rows, config_of_adapter)
    if run.model.adapters:
        merged = ", ".join(run.model.adapters)
        rows.notes.append(f"model.adapters: this adapter belongs on the model with {merged} merged into it")
    arguments = trainer_arguments(run, validated="validation" in encoded, max_length=max_length)
    return Prepared(run, task, place, config, processor, rows, encoded, max_length, config_of_adapter, arguments)


def note_idle_schedule(rows: Rows, config: PeftConfig) -> None:
    """Adds a note for a method that is to end with the ranks that it starts with."""
    end = config.at_the_end() if isinstance(config, LowRankConfig) else None
    if end is not None and isinstance(config, LowRankConfig) and end.ranks() == config.ranks():
        rows.notes.append(
            f"method: {config.ranks_in_words()}: it starts with the ranks that it ends with, so nothing is ever pruned; "
            "start with more (the papers take 1.5 times as many)"
        )


@dataclass(frozen=True)
class Plan:
    """The numbers of a run.

    Args:
        optimizer: where it is one of rankfold's.
        clip: the norm to which gradients are clipped, or 0.
        classes: with their training rows, in words.
        tokens: seen in training, padding left out; means nothing where `max_length` is None.
        estimated: the steps are an estimate (packing fills rows as well as it can).
    """

    run: RunFile
    architecture: str
    budget: Budget
    optimizer: RunOptimizer | None
    clip: float
    rows: dict[str, int]
    classes: str
    notes: list[str]
    max_length: int | None
    steps: int
    epochs: float
    tokens: int
    estimated: bool
    devices: int

    def lines(self) -> list[tuple[str, str]]:
        """The plan in words: pairs of a heading and a value."""
        b, t = self.budget, self.run.training
        about = "about " if self.estimated else ""
        fields = ", ".join(f"{key} {value}" for key, value in self.run.method.fields.items())
        share = 100 * b.trainable / (b.base + b.trainable)
        memory = b.memory(self.optimizer.state_bytes if self.optimizer else None)
        accumulation = f" x {t.gradient_accumulation} accumulated" if t.gradient_accumulation > 1 else ""
        return [
            ("model", f"{self.run.model.name} ({self.architecture}, {b.base:,} frozen parameters)"),
            ("method", f"{self.run.method.name}{f' ({fields})' if fields else ''}"),
            (
                "trainable",
                f"{b.trainable:,} parameters, {share:.3g} % of all"
                + (f": adapter {b.adapter:,}, head {b.head:,}" if b.head else ""),
            ),
            (
                "data",
                ", ".join(f"{count:,} {split}" for split, count in self.rows.items())
                + (f" rows of at most {self.max_length:,} tokens" if self.max_length else " rows"),
            ),
            *([("classes", self.classes)] if self.classes else []),
            (
                "steps",
                f"{about}{self.steps:,} of {t.batch_size}{accumulation} rows on {self.devices} "
                f"{'device' if self.devices == 1 else 'devices'} ({self.epochs:.3g} epochs"
                + (f", {about}{self.tokens:,} tokens)" if self.max_length else ")"),
            ),
            ("optimiser", describe(t, self.clip, self.optimizer)),
            (
                "memory",
                f"{size(sum(memory.values()))} on each device ("
                + ", ".join(f"{name} {size(held)}" for name, held in memory.items())
                + "), and activations",
            ),
        ]


def _to_count(prepared: Prepared) -> tuple[PeftModel, str]:
    """The adapted model, without its weights unless the method reads them, and the name of its class."""
    for weights in (False, True):
        skeleton, new = model.load_model(prepared.run, prepared.place, prepared.config, weights=weights)
        try:
            config = copy.deepcopy(prepared.peft_config)
            return model.adapt(skeleton, config, new, prepared.processor), type(skeleton).__name__
        except NotImplementedError:  # torch's word for values that a tensor without memory does not have
            if weights:
                raise
    raise AssertionError("not reached")


def make_plan(prepared: Prepared) -> Plan:
    """The plan of a run, from the shapes of its model alone."""
    run, rows = prepared.run, prepared.rows
    adapted, architecture = _to_count(prepared)
    optimizer = RunOptimizer.of(run, adapted)  # before counting: it may freeze factors
    longest = prepared.max_length or math.inf
    train = prepared.encoded["train"]
    kept = sum(min(length, longest) for length in [*train.lengths, *train.second])
    # Packing fills rows of max_length; the others are one example each.
    examples = math.ceil(kept / longest) if run.data.packing else len(train.lengths)
    devices = processes().num_processes
    batches = math.ceil(examples / (run.training.batch_size * devices))
    steps_an_epoch = math.ceil(batches / run.training.gradient_accumulation)
    steps = run.training.max_steps or math.ceil((run.training.epochs or 3.0) * steps_an_epoch)
    epochs = steps / steps_an_epoch
    return Plan(
        run=run,
        architecture=architecture,
        budget=budget.count(adapted),
        optimizer=optimizer,
        clip=prepared.arguments["max_grad_norm"],
        rows={name: len(split) for name, split in rows.splits.items()},
        classes=rows.classes_in_words(),
        notes=[*rows.notes, *filter(None, [in_words(unreached(adapted))])],
        max_length=prepared.max_length,
        steps=steps,
        epochs=epochs,
        tokens=round(kept * epochs),
        estimated=run.data.packing,
        devices=devices,
    )
