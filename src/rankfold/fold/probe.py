"""The fold in action: logits of the trained adapter against those of the folded LoRA in stock PEFT, same base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers.utils import logging

from rankfold.fold.proof import logit_error
from rankfold.fold.source import AUTO, read_tensors


def probe(adapter: Path, folded: Path, config: PeftConfig, base: str | None) -> dict[str, object]:
    """Runs both on one batch of token ids (fixed seed, float32).

    Returns:
        The largest logit error, or {"skipped": why} where the base's weights cannot be had or the task has no logits.
    """
    task = str(getattr(config.task_type, "value", config.task_type))
    name = base or config.base_model_name_or_path
    if task not in AUTO:
        return {"skipped": f"task_type={task} has no probe; CAUSAL_LM and SEQ_CLS have"}
    if not name:
        return {"skipped": "the base model is not known"}
    labels = _labels(read_tensors(adapter)) if task == "SEQ_CLS" else None
    extra = {} if labels is None else {"num_labels": labels, "ignore_mismatched_sizes": True}

    def load() -> nn.Module:
        with _quiet():  # a head that is loaded a line later needs no warning
            return AUTO[task].from_pretrained(name, dtype=torch.float32, **extra)

    try:
        model = PeftModel.from_pretrained(load(), str(adapter))
    except (OSError, MemoryError) as error:
        return {"skipped": f"base {name!r} could not be loaded: {str(error).splitlines()[0]}"}
    batch = torch.randint(5, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    trained = _logits(model, batch)
    del model
    return {"base": name, **logit_error(trained, _logits(PeftModel.from_pretrained(load(), str(folded)), batch))}


@contextmanager
def _quiet() -> Iterator[None]:
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch, attention_mask=torch.ones_like(batch)).logits


def _labels(tensors: dict[str, Tensor]) -> int | None:
    """Number of labels, from the saved head: the smallest output of its matrices."""
    outs = [v.shape[0] for k, v in tensors.items() if k.endswith("weight") and v.ndim == 2 and "lowrank" not in k]
    return min(outs, default=None)
