"""The base model of an adapter with its weights, for the probe and for merging."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers.utils import logging

from rankfold.fold.source import model_class


def load_base(config: PeftConfig, name: str, dtype: torch.dtype | str, heads: Mapping[str, Tensor]) -> nn.Module:
    """The base model.

    Args:
        config: the adapter's.
        name: folder or hub id.
        dtype: of the weights; "auto" keeps the file's.
        heads: the adapter's own tensors of modules_to_save, which say how many labels a classifier has.

    Raises:
        OSError: the weights cannot be had.
    """
    task = str(getattr(config.task_type, "value", config.task_type))
    labels = _labels(heads) if task == "SEQ_CLS" else None
    extra = {} if labels is None else {"num_labels": labels, "ignore_mismatched_sizes": True}
    with quiet():  # a head that is loaded a line later needs no warning
        return model_class(config).from_pretrained(name, dtype=dtype, **extra)  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def quiet() -> Iterator[None]:
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _labels(tensors: Mapping[str, Tensor]) -> int | None:
    """Number of labels, from the saved head: the smallest output of its matrices."""
    outs = [v.shape[0] for k, v in tensors.items() if k.endswith("weight") and v.ndim == 2 and "lowrank" not in k]
    return min(outs, default=None)
