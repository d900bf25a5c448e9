"""The fold in action: logits of the trained adapter against those of the fold, loaded without rankfold, on one base."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from rankfold.fold.profiles.profile import Profile
from rankfold.fold.proof import logit_error
from rankfold.fold.source import base_class, base_model
from rankfold.io.adapters import read_tensors
from rankfold.io.models import load_base, quiet


def probe(adapter: Path, folded: Path, config: PeftConfig, base: str | None, profile: Profile) -> dict[str, object]:
    """Runs both on one batch of token ids (fixed seed, float32).

    Returns:
        The largest logit error, or {"skipped": why} where the base's weights cannot be had, the task has no logits or
        the format is not for Python.
    """
    if profile.loads_as == "nothing":
        return {"skipped": f"{profile.noun} is not for Python; docs/serving.md says what was compared"}
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
    if profile.loads_as == "model":
        found, loader = load_base(base_class(config), folded, torch.float32), "transformers"
    else:
        found, loader = _load(folded, config, name, read_tensors(adapter)), "stock PEFT"
    again = _logits(found, batch)
    if not (torch.isfinite(trained).all() and torch.isfinite(again).all()):
        return {"skipped": "the logits are not finite"}
    return {"base": name, "loaded_by": loader, **logit_error(trained, again)}


def trained_model(adapter: Path, config: PeftConfig, base: str | None) -> PeftModel:
    """The adapter on its base in float32, as PEFT loads it.

    Raises:
        OSError, ValueError: the base's weights cannot be had.
    """
    return _load(adapter, config, base or config.base_model_name_or_path, read_tensors(adapter))


def _load(adapter: Path, config: PeftConfig, base: str | None, tensors: dict[str, Tensor]) -> PeftModel:
    model = base_model(config, base, torch.float32, tensors)
    with quiet():
        return PeftModel.from_pretrained(model, str(adapter))  # pyright: ignore[reportArgumentType]


def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch, attention_mask=torch.ones_like(batch)).logits
