"""Counts what one method costs on one model, on a real adapter over a copy of the model without values."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from rankfold.errors import RankfoldError
from rankfold.host.config import LowRankConfig
from rankfold.host.memory import check_fits
from rankfold.host.names import absent_in_words
from rankfold.host.targets import absent_names
from rankfold.host.unreached import in_words, unreached
from rankfold.io.models import meta_copy
from rankfold.plan.flops import adapter_flops, base_flops
from rankfold.plan.folding import Fold, forecast
from rankfold.plan.optimizer import PlannedOptimizer
from rankfold.plan.ranks import at_the_end
from rankfold.text import first_line
from rankfold.train import budget
from rankfold.train.model import adapter_size


@dataclass(frozen=True)
class Cost:
    """Cost of one adapter on one model.

    Args:
        trained: parameters that the optimiser changes in the adapter; at the start, where ranks fall during training.
        head: parameters trained in full beside it.
        stored: parameters in the saved adapter's file, head included.
        optimizer_bytes: the optimiser's float32 state; by default AdamW's two, of all that is trained.
        fold: the plain LoRA it folds into, or why there is none. Where ranks fall it is the largest that may come out.
        flops: the adapter's matrix products for one token over the base's, forward, and with backward; None where
            they could not be counted (flops.py says what is).
        trained_at_end: `trained` at the target ranks of a method whose ranks fall, spread evenly; else None.
        live: of `trained`, at most so many at a time, where a method trains one part after another; else None.
        cumulative: of all such parts in the file in the end, before any re-factoring; None where the length of the run decides.
        notes: what its reader should know.
    """

    trained: int
    head: int
    stored: int
    optimizer_bytes: int
    fold: Fold | str
    flops: tuple[float, float] | None
    trained_at_end: int | None = None
    live: int | None = None
    cumulative: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def folded(self) -> int | None:
        """Parameters of the fold that `rankfold fold` writes, or None."""
        return self.fold.parameters if isinstance(self.fold, Fold) else None

    @property
    def folded_rank(self) -> int | None:
        return self.fold.rank if isinstance(self.fold, Fold) else None


def cost(base: nn.Module, config: PeftConfig, optimizer: PlannedOptimizer | None = None) -> Cost:
    """The cost of a method, ours or PEFT's; neither the model nor the config is changed.

    Args:
        base: a transformers model, of `meta_model` or a real one.
        optimizer: whose state is counted; by default AdamW's.

    Raises:
        ValueError: the method cannot run on this model; in one sentence.
    """
    model = adapted(base, config)
    state_bytes = optimizer.state_bytes(model) if optimizer else None  # first: it may freeze factors
    spent = budget.count(model)
    saved = _saved(model)
    fold, added, whole = forecast(model), adapter_flops(model), base_flops(base)
    end = at_the_end(config)
    stored = sum(t.numel() for t in saved.values())
    known = spent.live is not None and isinstance(config, LowRankConfig) and config.parts() is not None
    notes = [found] if (found := in_words(unreached(model))) else []
    if added is None:
        notes.append("its operations could not be counted without values")
    return Cost(
        trained=spent.adapter,
        head=spent.head,
        stored=stored,
        optimizer_bytes=spent.memory(state_bytes)["optimiser"],
        fold=fold,
        flops=(added[0] / whole, added[1] / (2 * whole)) if added and whole else None,
        trained_at_end=None if end is None else trained(base, end),
        live=spent.live,
        cumulative=stored - spent.head if known else None,
        notes=notes,
    )


def _saved(model: PeftModel) -> dict[str, torch.Tensor]:
    """What `save_pretrained` would write."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = None  # or PEFT asks the hub whether the vocabulary grew
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that an adapted output head is saved with its base
            return get_peft_model_state_dict(model)
    except NotImplementedError as error:  # an adapted head of a model without an embedding, such as a speech model
        raise RankfoldError(
            f"{type(config).__name__}: PEFT cannot save it on this model: {first_line(error)}; leave lm_head out"
        ) from error


def trained(base: nn.Module, config: PeftConfig) -> int:
    """Parameters that are trained in the adapter; arguments and errors as `cost`."""
    return budget.count(adapted(base, config)).adapter


def adapted(base: nn.Module, config: PeftConfig) -> PeftModel:
    """A copy of the model without values, with the adapter; arguments and errors as `cost`."""
    config = copy.deepcopy(config)
    for name, absent in absent_names(config, base):
        if name in ("target_modules", "target_parameters"):
            raise RankfoldError(f"{type(config).__name__}: {name}: {absent_in_words(name, absent, base)}")
    if isinstance(config, LowRankConfig):
        config.allow_unscheduled = True
    check_fits(config, base, lambda: adapter_size(base, config))
    try:
        # forked: what a first value draws must not move the caller's generator
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device("meta"):
            warnings.simplefilter("ignore")  # PEFT's advice about training
            model: Any = get_peft_model(meta_copy(base), config, autocast_adapter_dtype=False)  # pyright: ignore[reportArgumentType]
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, AssertionError) as error:
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        title = type(config).__name__
        raise RankfoldError(message if message.startswith(title) else f"{title}: {message}") from error
    return model
