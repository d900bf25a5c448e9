"""The base model of an adapter with its weights, for the probe and for merging."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers.utils import logging

from rankfold.fold.source import base_class
from rankfold.tasks import table


def load_base(
    config: PeftConfig, name: str | None, dtype: torch.dtype | str, tensors: Mapping[str, Tensor]
) -> nn.Module:
    """The base model.

    Args:
        config: the adapter's.
        name: folder or hub id.
        dtype: of the weights; "auto" keeps the file's.
        tensors: the adapter's, whose modules_to_save say how many labels a classifier has.

    Raises:
        OSError, ValueError: the weights cannot be had.
    """
    task = table.of_peft_type(config.task_type)
    labels = _labels(tensors, config) if task and task.new_head else None
    extra = {} if labels is None else {"num_labels": labels, "ignore_mismatched_sizes": True}
    with quiet():  # a head that is loaded a line later needs no warning
        return base_class(config).from_pretrained(name, dtype=dtype, **extra)


@contextmanager
def quiet() -> Iterator[None]:
    """Neither warnings nor bars of transformers."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _labels(tensors: Mapping[str, Tensor], config: PeftConfig) -> int | None:
    """Number of labels, from the saved head: the smallest output of its matrices."""
    kept = set(getattr(config, "modules_to_save", None) or [])
    heads = [v for k, v in tensors.items() if kept & set(k.split(".")) and k.endswith("weight")]
    return min((v.shape[0] for v in heads if v.ndim == 2), default=None)
