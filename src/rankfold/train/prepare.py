"""What a run will do, before it does it: parameters, steps, tokens and memory, without loading a weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState

from rankfold.io.models import locate
from rankfold.text import size
from rankfold.train import budget, model, tokens
from rankfold.train.budget import Budget
from rankfold.train.data import Rows, load_rows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from rankfold.runfile.schema import RunFile


def processes() -> PartialState:
    """This process among those of `accelerate launch`."""
    # Without an accelerator accelerate only looks for the others (gloo) when told that this is meant.
    return PartialState(cpu=not torch.accelerator.is_available())


@dataclass
class Prepared:
    """Everything of a run but its weights."""

    run: RunFile
    place: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    lengths: dict[str, list[int]]
    max_length: int

    def for_trainer(self, split: str) -> Any:
        """A split as its trainer takes it, or None."""
        rows = self.rows[split]
        return rows and tokens.for_trainer(rows, self.rows, self.run, self.tokenizer, self.max_length)


def prepare(run: RunFile) -> Prepared:
    """Find and check the model's config and tokenizer and the rows.

    Raises:
        ModelError, DataError: what does not fit, and the fix.
    """
    place = locate(run.model.name)
    with processes().main_process_first():  # the others find the caches filled
        rows = load_rows(run)
        config = model.load_config(run, place, rows.labels)
        tokenizer = model.load_tokenizer(run.model, place)
        max_length = tokens.longest_row(run, config, tokenizer)
        lengths = tokens.token_counts(rows, tokenizer)
    tokens.note_cut_off(rows, lengths, max_length)
    return Prepared(run, place, config, tokenizer, rows, lengths, max_length)


@dataclass(frozen=True)
class Plan:
    """The numbers of a run.

    Args:
        tokens: seen in training, padding left out.
        estimated: the steps are an estimate (packing fills rows as well as it can).
    """

    run: RunFile
    architecture: str
    budget: Budget
    rows: dict[str, int]
    notes: list[str]
    max_length: int
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
        memory = b.memory()
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
                + f" rows of at most {self.max_length:,} tokens",
            ),
            (
                "steps",
                f"{about}{self.steps:,} of {t.batch_size}{accumulation} rows on {self.devices} "
                f"{'device' if self.devices == 1 else 'devices'} ({self.epochs:.3g} epochs, {about}{self.tokens:,} tokens)",
            ),
            (
                "memory",
                f"{size(sum(memory.values()))} on each device ("
                + ", ".join(f"{name} {size(held)}" for name, held in memory.items())
                + "), and activations",
            ),
        ]


def make_plan(prepared: Prepared) -> Plan:
    """The plan of a run, from the shapes of its model alone."""
    run, rows = prepared.run, prepared.rows
    skeleton, new = model.load_model(run, prepared.place, prepared.config, weights=False)
    adapted = model.adapt(skeleton, run, new, prepared.tokenizer)
    kept = [min(length, prepared.max_length) for length in prepared.lengths["train"]]
    # Packing fills rows of max_length; the others are one example each.
    examples = math.ceil(sum(kept) / prepared.max_length) if run.data.packing else len(kept)
    devices = processes().num_processes
    batches = math.ceil(examples / (run.training.batch_size * devices))
    steps_an_epoch = math.ceil(batches / run.training.gradient_accumulation)
    steps = run.training.max_steps or math.ceil((run.training.epochs or 3.0) * steps_an_epoch)
    epochs = steps / steps_an_epoch
    return Plan(
        run=run,
        architecture=type(skeleton).__name__,
        budget=budget.count(adapted),
        rows={name: len(split) for name, split in rows.splits.items()},
        notes=list(rows.notes),
        max_length=prepared.max_length,
        steps=steps,
        epochs=epochs,
        tokens=round(sum(kept) * epochs),
        estimated=run.data.packing,
        devices=devices,
    )
