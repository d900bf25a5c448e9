"""The fold in action: logits of the trained adapter against those of the fold, loaded without rankfold, on one base."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from rankfold.fold.base import load_base, quiet
from rankfold.fold.profile import Profile
from rankfold.fold.proof import logit_error
from rankfold.fold.source import AUTO, read_tensors


def probe(adapter: Path, folded: Path, config: PeftConfig, base: str | None, profile: Profile) -> dict[str, object]:
    """Runs both on one batch of token ids (fixed seed, float32).

    Returns:
        The largest logit error, or {"skipped": why} where the base's weights cannot be had, the task has no logits or
        the format is not for Python.
    """
    task = str(getattr(config.task_type, "value", config.task_type))
    name = base or config.base_model_name_or_path
    if profile.loads_as == "nothing":
        return {"skipped": f"{profile.noun} is for an engine outside Python; docs/serving.md says how to compare"}
    if task not in AUTO:
        return {"skipped": f"task_type={task} has no probe; CAUSAL_LM and SEQ_CLS have"}
    if not name:
        return {"skipped": "the base model is not known"}
    tensors = read_tensors(adapter)

    def load(path: str) -> nn.Module:
        return load_base(config, path, torch.float32, tensors)

    try:
        model = PeftModel.from_pretrained(load(name), str(adapter))  # pyright: ignore[reportArgumentType]
    except (OSError, MemoryError) as error:
        return {"skipped": f"base {name!r} could not be loaded: {str(error).splitlines()[0]}"}
    batch = torch.randint(5, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    trained = _logits(model, batch)
    del model
    if profile.loads_as == "model":
        with quiet():
            found, loader = AUTO[task].from_pretrained(folded, dtype=torch.float32), "transformers"
    else:
        found, loader = PeftModel.from_pretrained(load(name), str(folded)), "stock PEFT"  # pyright: ignore[reportArgumentType]
    return {"base": name, "loaded_by": loader, **logit_error(trained, _logits(found, batch))}


def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch, attention_mask=torch.ones_like(batch)).logits
