"""The fold in action: logits of the trained adapter against those of the folded LoRA in stock PEFT, same base."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers.utils import logging

from rankfold.fold.proof import logit_error
from rankfold.fold.source import base_class, read_tensors


def probe(adapter: Path, folded: Path, config: PeftConfig, base: str | None) -> dict[str, object]:
    """Runs both on one batch of token ids (fixed seed, float32).

    Returns:
        The largest logit error, or {"skipped": why} where the base's weights cannot be had or the task has no logits.
    """
    if not getattr(base_class(config), "__name__", "").endswith(
        ("ForCausalLM", "ForSequenceClassification", "LMHeadModel")
    ):
        return {"skipped": f"task_type={config.task_type} has no probe; CAUSAL_LM and SEQ_CLS have"}
    name = base or config.base_model_name_or_path
    if not name:
        return {"skipped": "the base model is not known"}
    try:
        model = trained_model(adapter, config, base)
    except (OSError, MemoryError) as error:
        return {"skipped": f"base {name!r} could not be loaded: {str(error).splitlines()[0]}"}
    batch = torch.randint(5, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    trained = _logits(model, batch)
    del model
    return {"base": name, **logit_error(trained, _logits(_load(folded, config, name, _labels(adapter, config)), batch))}


def trained_model(adapter: Path, config: PeftConfig, base: str | None) -> PeftModel:
    """The adapter on its base in float32, as PEFT loads it.

    Raises:
        OSError, ValueError: the base's weights cannot be had.
    """
    return _load(adapter, config, base or config.base_model_name_or_path, _labels(adapter, config))


def _load(adapter: Path, config: PeftConfig, base: str | None, labels: int | None) -> PeftModel:
    sequences = str(getattr(config.task_type, "value", config.task_type)) == "SEQ_CLS"
    extra = {"num_labels": labels, "ignore_mismatched_sizes": True} if sequences and labels is not None else {}
    with _quiet():  # a head that is loaded a line later needs no warning
        model = base_class(config).from_pretrained(base, dtype=torch.float32, **extra)
        return PeftModel.from_pretrained(model, str(adapter))


@contextmanager
def _quiet() -> Iterator[None]:
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


def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch, attention_mask=torch.ones_like(batch)).logits


def _labels(adapter: Path, config: PeftConfig) -> int | None:
    """Number of labels, from the saved head: the smallest output of its matrices."""
    kept = set(getattr(config, "modules_to_save", None) or [])
    heads = [v for k, v in read_tensors(adapter).items() if kept & set(k.split(".")) and k.endswith("weight")]
    return min((v.shape[0] for v in heads if v.ndim == 2), default=None)
