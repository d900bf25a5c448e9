"""Text in, class out: transformers' Trainer on texts or pairs of texts with a label."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from rankfold.errors import short
from rankfold.tasks.rows import DataError, Encoded, Rows
from rankfold.tasks.task import Metric, Task

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
    models = ("AutoModelForSequenceClassification", "AutoModelForImageClassification")
    peft_type = "SEQ_CLS"
    new_head = True
    metrics = {  # noqa: RUF012
        "accuracy": Metric(greater_is_better=True),
        "macro_f1": Metric(greater_is_better=True, of_rows=False),
        "loss": Metric(greater_is_better=False),
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
        def tokens(batch: dict[str, list], **options: Any) -> dict[str, list]:
            return dict(processor(batch["text"], batch.get("text_pair"), verbose=False, **options))

        def encode(batch: dict[str, list]) -> dict[str, list]:
            found = tokens(batch)
            lengths = [len(ids) for ids in found["input_ids"]]
            # Cutting is the tokenizer's own business (the last token stays, and of a pair the longer one is cut).
            long = [i for i, length in enumerate(lengths) if max_length is not None and length > max_length]
            if long:
                part = {column: [batch[column][i] for i in long] for column in inputs}
                cut = tokens(part, truncation=True, max_length=max_length)
                for name, values in cut.items():
                    for i, value in zip(long, values, strict=True):
                        found[name][i] = value
            return {**found, "labels": batch["label"], "length": lengths}

        table, inputs = rows.splits[split], rows.inputs
        made = table.map(encode, batched=True, remove_columns=table.column_names)
        return Encoded(made.remove_columns("length"), made["length"][:])

    def trainer(self) -> type:
        from transformers import Trainer

        return Trainer

    def arguments_class(self) -> type:
        from transformers import TrainingArguments

        return TrainingArguments

    def arguments(self, data: Any, max_length: int | None) -> dict[str, Any]:
        # PEFT wraps the model, so Trainer cannot read the label's name off its forward.
        return {"label_names": ["labels"]}

    def options(self, processor: Any) -> dict[str, Any]:
        return {"compute_metrics": _metrics}

    def scores(self, output: Any, inputs: dict[str, Any], metric: str) -> tuple[Tensor, Tensor]:
        import torch
        from torch.nn.functional import cross_entropy

        logits, labels = output.logits.detach(), inputs["labels"]
        right_or_loss = (
            (logits.argmax(-1) == labels).double()
            if metric == "accuracy"
            else cross_entropy(logits.double(), labels, reduction="none")
        )
        return right_or_loss, torch.ones_like(right_or_loss)


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy and macro-averaged F1 (the mean over the classes that occur)."""
    import numpy as np
    from sklearn.metrics import accuracy_score, f1_score

    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    predicted, labels = np.argmax(logits, axis=-1), prediction.label_ids
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),  # pyright: ignore[reportArgumentType]
    }


def _index_labels(rows: Rows, order: list[str | int] | None) -> None:
    """Replace labels by indices."""
    from datasets import ClassLabel

    for name, split in rows.splits.items():
        for number, label in enumerate(split["label"], 1):
            if not isinstance(label, str | int) or (isinstance(label, str) and not label.strip()):
                missing = label is None or isinstance(label, str)
                what = "is missing" if missing else f"is {short(label)}; a class is text or a whole number"
                raise DataError(f"{name}, row {number}: the label {what}")
    counts = {name: Counter(split["label"]) for name, split in rows.splits.items()}
    seen = sorted(counts["train"], key=lambda label: (isinstance(label, str), _natural(label)))
    labels = [str(label) for label in (order if order is not None else seen)]
    if len(labels) < 2:
        raise DataError(f"train has the single label {short(seen[0])}; classification needs at least two")
    if repeated := [label for label, count in Counter(labels).items() if count > 1]:
        raise DataError(f"data.labels names {', '.join(map(repr, repeated))} more than once")
    for name, counter in counts.items():
        for label, count in counter.items():
            if str(label) not in labels:
                where = "is not in data.labels" if order is not None else "is never seen in train"
                raise DataError(
                    f"{name}: the label {short(label)} ({count:,} {'row' if count == 1 else 'rows'}) {where}; "
                    f"known labels: {', '.join(labels)}"
                )
    of_train = Counter(map(str, counts["train"].elements()))
    rows.class_counts = {label: of_train[label] for label in labels}
    if order is None:
        rows.notes += [f"train: {note}" for note in _alike(labels)]
        if numbers := [label for label in labels if _is_fraction(label)]:
            rows.notes.append(
                f"train: {len(numbers):,} of {len(labels):,} labels are numbers with a fraction (such as {numbers[0]}), and each is "
                "taken for a class; give data.labels if that is meant"
            )
    if unseen := set(labels) - {str(label) for label in seen}:
        rows.notes.append(f"train: no row has the label {', '.join(sorted(unseen))} of data.labels")
    index = {label: i for i, label in enumerate(labels)}
    rows.labels = labels
    for name, split in rows.splits.items():
        indices = [index[str(label)] for label in split["label"]]
        split = split.remove_columns("label").add_column("label", indices)
        rows.splits[name] = split.cast_column("label", ClassLabel(names=labels))


def _alike(labels: list[str]) -> list[str]:
    """Sentences about classes that differ in case or spaces alone."""
    found: dict[str, list[str]] = {}
    for label in labels:
        found.setdefault(" ".join(label.casefold().split()), []).append(label)
    twins = [
        f"the labels {', '.join(map(repr, same))} differ in case or spaces alone; if they are one class, write them alike"
        for same in found.values()
        if same[1:]
    ]
    lone = [same[0] for same in found.values() if not same[1:] and same[0] != same[0].strip()]
    return twins + [f"the label {label!r} begins or ends with a space" for label in lone]


def _is_fraction(label: str) -> bool:
    try:
        return not label.strip().lstrip("+-").isdecimal() and math.isfinite(float(label))
    except ValueError:
        return False


def _natural(label: str | int) -> tuple[int, int, str]:
    """10 after 9, also where a CSV file made them text."""
    return (0, int(label), "") if str(label).lstrip("-").isdecimal() else (1, 0, str(label))


TASK = Classification()
