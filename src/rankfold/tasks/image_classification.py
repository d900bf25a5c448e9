"""Image in, class out: transformers' Trainer on folders of images, or on files of rows with images and labels."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankfold.tasks.classification import Classification
from rankfold.tasks.images import class_folders, content, note_converted, opened, problem
from rankfold.tasks.rows import SPLITS, Encoded, Rows, mapped

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor


class ImageClassification(Classification):
    name = "image-classification"
    summary = "image in, class out"
    kinds = (("image", "label"),)
    optional = ()
    foreign = ("max_length", "packing", "loss_on")
    max_length = None
    processor = "AutoImageProcessor"
    models = ("AutoModelForImageClassification",)
    peft_type = None
    pipeline = "image-classification"
    start = {  # noqa: RUF012
        "model": {"name": "dinov2-small"},
        "data": {"source": "digits"},
        "method": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "training": {"epochs": 2, "batch_size": 16, "learning_rate": 1e-3, "seed": 0},
    }
    comparison = (
        """\
model: dinov2-small
task: image-classification
data: {source: digits}
training: {max_steps: 60, batch_size: 16, warmup: 0.1, evaluate_every: 20}
output: runs/compare-digits
""",
        "663,552",
        "667000",
    )

    def folder(self, folder: Path) -> dict[str, Dataset]:
        inside = {name: folder / name for name in SPLITS if (folder / name).is_dir()}
        if "train" not in inside:
            inside = {"train": folder}
        return {name: class_folders(path) for name, path in inside.items()}

    def placed(self, split: Dataset, names: dict[str, str], folder: Path) -> Dataset:
        column = names["image"]
        if getattr(split.features.get(column), "dtype", None) != "string":
            return split
        return mapped(split, lambda row: {column: row[column] and str(folder / row[column])})

    def as_ours(self, split: Dataset, names: dict[str, str]) -> Dataset:
        from datasets import Image

        column = names["image"]
        if isinstance(split.features.get(column), Image):
            split = split.cast_column(column, Image(decode=False))  # a file is opened when its row is needed
        return split

    def kind(self, columns: list[str], names: dict[str, str]) -> tuple[str, ...]:
        return super(Classification, self).kind(columns, names)

    def problem(self, value: Any, column: str, kind: tuple[str, ...]) -> str | None:
        return problem(value)

    def tidy(self, split: Dataset, kind: tuple[str, ...], name: str, notes: list[str]) -> Dataset:
        note_converted(split["image"], name, notes)
        return split

    def key(self, row: Any, inputs: tuple[str, ...]) -> str:
        return hashlib.sha256(content(row["image"])).hexdigest()

    def content(self, row: Any) -> str:
        return super().content(row | {"image": self.key(row, ())})

    def encode(self, rows: Rows, split: str, processor: Any, max_length: int | None, data: Any) -> Encoded:
        """Images as they were found: pixels are made when a batch is."""
        made = rows.splits[split].rename_column("label", "labels")
        return Encoded(made, [1] * len(made))

    def arguments(self, data: Any, max_length: int | None) -> dict[str, Any]:
        # The model's forward has no argument for what the batch is made of, and there are no tokens to count.
        return {
            **super().arguments(data, max_length),
            "remove_unused_columns": False,
            "include_num_input_tokens_seen": "no",
        }

    def options(self, processor: Any, labels: list[str]) -> dict[str, Any]:
        return {**super().options(processor, labels), "data_collator": functools.partial(_batch, processor)}

    def example(self, config: Any) -> dict[str, Tensor]:
        import torch

        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        seeded = torch.Generator().manual_seed(0)
        return {"pixel_values": torch.randn(2, config.num_channels, height, width, generator=seeded)}


def _batch(processor: Any, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    import torch

    pixels = processor([opened(row["image"]) for row in rows], return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}


TASK = ImageClassification()
