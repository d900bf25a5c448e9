"""The row of a task: everything that differs between tasks, from the columns of a row to the model card.

A task is a subclass of `Task` in a file of its own, with one instance called `TASK`. Importing it needs no heavy package: what does
is imported inside the methods.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rankfold.errors import short
from rankfold.tasks.rows import DataError, Encoded, Rows

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """A metric that a task can be judged by.

    Args:
        greater_is_better: which of two values is better.
        logged_as: the trainer's name for it, where it is another.
        of_rows: it is a mean of scores of rows, so a comparison knows what other rows would change.
        by_row: makes those scores of all rows together, of the two values that `Task.scores` gives for each; by default these are score
            and weight already.
        bounds: the smallest and the largest value it can have; intervals end there.
    """

    greater_is_better: bool
    logged_as: str | None = None
    of_rows: bool = True
    by_row: Callable[[Sequence[float], Sequence[float]], list[float]] | None = None
    bounds: tuple[float, float] = (-math.inf, math.inf)


SHARE, LOSS = (0.0, 1.0), (0.0, math.inf)


class Task(ABC):
    """One task. The attributes are data; the methods that have a default do what tasks on texts share."""

    name: ClassVar[str]
    """The name in run files and in `--task`."""
    summary: ClassVar[str]
    """What goes in and what comes out, as in "text in, class out"."""

    # --- rows
    kinds: ClassVar[tuple[tuple[str, ...], ...]]
    """The sets of columns that rows may have, the preferred first. `data.columns` of a run file knows all of them."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Columns that rows have only where the run file names them."""
    targets: ClassVar[tuple[str, ...]] = ()
    """Columns that hold what is to be learnt."""
    foreign: ClassVar[tuple[str, ...]] = ()
    """Fields of the run file's `data` that mean nothing for this task."""
    max_length: ClassVar[int | None]
    """Longest row in tokens where the run file names none; None for rows that are not tokens."""
    keyed: ClassVar[str] = "rows"
    """What `key` tells apart, in words."""

    # --- model
    processor: ClassVar[str] = "AutoTokenizer"
    """The class of transformers that turns rows into the model's inputs."""
    models: ClassVar[tuple[str, ...]]
    """The Auto classes of transformers. The first one is trained; `rankfold plan` tries the others too."""
    peft_type: ClassVar[str | None]
    """PEFT's TaskType; None where PEFT has none, and the model's class says what the adapter is for."""
    new_head: ClassVar[bool] = False
    """The head has one output per class, starts at random and is trained in full."""

    # --- training
    metrics: ClassVar[dict[str, Metric]]
    """By name; the first one is the default."""
    fused_head: ClassVar[bool] = False
    """The trainer is one of TRL's that score labels with a head fused with the loss."""
    loss_of_labels: ClassVar[bool] = False
    """The trainer reads nothing but the labels' scores off TRL's fused head, so the others need not be computed."""
    loss_of_batch: ClassVar[bool] = False
    """The model's loss is the mean over its own batch and ignores the other batches of a step."""
    weighted: ClassVar[bool] = False
    """A row counts by its number of tokens in the metric."""
    passes: ClassVar[int] = 1
    """Forward passes that the trainer makes of a batch in evaluation."""
    own_arguments: ClassVar[tuple[str, ...]] = ()
    """Arguments of the trainer that `training.extra` may not set, beside those that `arguments` gives."""

    # --- words
    pipeline: ClassVar[str]
    """The hub's tag."""
    counts_rows: ClassVar[bool] = True
    """Speed is also reported in rows, not only in tokens."""
    start: ClassVar[dict[str, dict[str, Any]]]
    """What the file that `rankfold init` writes sets, by section; it works offline with the bundled model and data."""
    comparison: ClassVar[tuple[str, str, str]]
    """For `rankfold init --compare`: the file's beginning, what LoRA trains there at r = 8, and a budget a little above."""

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(column for kind in self.kinds for column in kind))

    def logged_as(self, metric: str) -> str:
        """The trainer's name for a metric, without prefix."""
        return self.metrics[metric].logged_as or metric

    @property
    def heads(self) -> tuple[str, ...]:
        """Ends of the names of the model classes that it trains."""
        return tuple(name.removeprefix("AutoModel") for name in self.models)

    # --- rows ---------------------------------------------------------------------------------------------------------------

    def folder(self, folder: Path) -> dict[str, Dataset] | None:
        """The splits in a folder that has no files of rows; None where it holds nothing for this task.

        Raises:
            DataError: a part of it is empty.
        """
        return None

    def placed(self, split: Dataset, names: dict[str, str], folder: Path) -> Dataset:
        """Rows of a file in `folder`, with the files that they name found from there."""
        return split

    def as_ours(self, split: Dataset, names: dict[str, str]) -> Dataset:
        """Rows as they were found, with columns of a usual form brought to those of one of `kinds`.

        Args:
            names: our columns → what the run file calls them.

        Raises:
            DataError: a form that cannot be learnt.
        """
        return split

    def carried(self, split: Dataset, names: dict[str, str], kind: tuple[str, ...]) -> tuple[str, ...]:
        """Columns beside `kind` that `encode` takes where they are there."""
        return ()

    def advice(self, columns: list[str]) -> str:
        """What to write in data.columns for rows with these columns."""
        return f"{{{self.kinds[-1][0]}: {columns[0]}}}"

    def kind(self, columns: list[str], names: dict[str, str]) -> tuple[str, ...]:
        """Which of `kinds` the rows have.

        Args:
            columns: of the training rows.
            names: our columns → what the run file calls them.

        Raises:
            DataError: none.
        """
        for kind in self.kinds:  # what the run file names wins over what happens to be there
            if any(names.get(role, role) != role for role in kind):
                return kind
        for kind in self.kinds:
            if all(names.get(role) in columns for role in kind):
                return kind
        kinds = [" + ".join(kind) for kind in self.kinds]
        listed = ", ".join(kinds[:-1]) + (", or " if kinds[1:] else "") + kinds[-1]
        raise DataError(
            f"train has none of the columns {listed}; it has: {', '.join(columns)}. "
            f"Say which is which, for instance data.columns: {self.advice(columns)}"
        )

    def problem(self, value: Any, column: str, kind: tuple[str, ...]) -> str | None:
        """What is wrong with one input, as the end of a sentence, or None."""
        return None if isinstance(value, str) else f"holds {short(value)}, not text"

    def tidy(self, split: Dataset, kind: tuple[str, ...], name: str, notes: list[str]) -> Dataset:
        """A split whose inputs are right one by one, in the form that `encode` takes.

        Args:
            name: of the split.
            notes: takes sentences for the reader.

        Raises:
            DataError: values of a row that do not fit each other.
        """
        return split

    def key(self, row: Any, inputs: tuple[str, ...]) -> str:
        """Rows of one key are duplicates; texts that differ only in case or spaces are."""
        texts = [row[column] if isinstance(row[column], str) else json.dumps(row[column]) for column in inputs]
        return "\0".join(" ".join(text.casefold().split()) for text in texts)

    def content(self, row: Any) -> str:
        """All that is in a row, files that it names included."""
        return json.dumps(row, sort_keys=True, default=str)

    def finish(self, rows: Rows, data: Any) -> None:
        """Checks and replaces the targets once the splits are made.

        Args:
            data: the `data` section of the run file.
        """
        return

    @abstractmethod
    def encode(self, rows: Rows, split: str, processor: Any, max_length: int | None, data: Any) -> Encoded:
        """A split as the trainer takes it. It is called once per split.

        Raises:
            DataError: rows that cannot be encoded.
        """

    def learnable(self, rows: Dataset, kept: slice) -> Sequence[int]:
        """Numbers of the encoded rows in which something is left to learn.

        Args:
            kept: what is left of a row's tokens when the trainer cuts it off.
        """
        return range(len(rows))

    # --- training -----------------------------------------------------------------------------------------------------------

    def trainer(self) -> type:
        """`transformers.Trainer`, or TRL's trainer that is made for the task."""
        from transformers import Trainer

        return Trainer

    def arguments_class(self) -> type:
        """The class of the trainer's arguments, which `training.extra` may set."""
        from transformers import TrainingArguments

        return TrainingArguments

    def arguments(self, data: Any, max_length: int | None) -> dict[str, Any]:
        """Arguments beside those that all tasks share."""
        # PEFT wraps the model, so Trainer cannot read the labels' name off its forward.
        return {"label_names": ["labels"]}

    def unread(self, extra: dict[str, Any]) -> dict[str, str]:
        """Those of `training.extra` that the trainer knows and would not read, and what to do instead."""
        return {}

    def options(self, processor: Any, labels: list[str]) -> dict[str, Any]:
        """What the trainer takes beside its arguments: compute_metrics, data_collator."""
        return {}

    @abstractmethod
    def scores(
        self, outputs: Sequence[Any], inputs: dict[str, Any], metric: str, trainer: Any
    ) -> tuple[Tensor, Tensor]:
        """The score of each row of a batch and what it counts, or the two values of which the metric's `by_row` makes scores.

        Args:
            outputs: of the model's last `passes` in evaluation. inputs: the batch as the trainer gets it.
            metric: one that is `of_rows`.
        """

    # --- afterwards ---------------------------------------------------------------------------------------------------------

    def example(self, config: Any) -> dict[str, Tensor]:
        """Two rows of what the model takes, always the same, for the probe of a fold; one without a padding token, which
        transformers' classifiers on a decoder refuse to take more than one row without.

        Args:
            config: the model's.
        """
        import torch

        text = config.get_text_config()
        words, rows = text.vocab_size, 1 if getattr(text, "pad_token_id", None) is None else 2
        ids = torch.randint(min(5, words - 1), words, (rows, 16), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
