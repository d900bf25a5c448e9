"""Metrics of a classifier, and the file of metrics that a run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rankfold.io.files import read_json_lines

if TYPE_CHECKING:
    from transformers import EvalPrediction


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy and macro-averaged F1 (the mean over the classes that occur)."""
    from sklearn.metrics import accuracy_score, f1_score

    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    predicted, labels = np.argmax(logits, axis=-1), prediction.label_ids
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),  # pyright: ignore[reportArgumentType]
    }


def tidy(logged: dict[str, Any], prefix: str) -> dict[str, float]:
    """Quality metrics of one evaluation under our names: `eval_mean_token_accuracy` is `token_accuracy`."""
    short = {key.removeprefix(f"{prefix}_").removeprefix("eval_"): value for key, value in logged.items()}
    short["token_accuracy"] = short.pop("mean_token_accuracy", None)
    kept = ("loss", "accuracy", "macro_f1", "token_accuracy")
    return {key: float(short[key]) for key in kept if short.get(key) is not None}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut off by a crash is left out."""
    return [row for _, row in read_json_lines(path, skip_damaged=True)]
