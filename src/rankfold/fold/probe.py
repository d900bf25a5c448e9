"""The fold in action: logits of the trained adapter against those of the fold, loaded without rankfold, on one base."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from rankfold.fold.profiles.profile import Profile
from rankfold.fold.proof import logit_error
from rankfold.fold.source import base_class, base_model
from rankfold.io.formats import SavedAdapter
from rankfold.io.models import load_base, quiet
from rankfold.pages import cite
from rankfold.tasks import table
from rankfold.tasks.task import Task
from rankfold.text import first_line


def probe(adapter: SavedAdapter, folded: Path, base: str | None, profile: Profile) -> dict[str, object]:
    """Runs both on the task's example (fixed seed, float32).

    Returns:
        The largest logit error, or {"skipped": why} where the task has no logits, the format is not for Python or anything
        fails: the fold itself is made, and a probe must not cost it.
    """
    config = adapter.config
    if profile.loads_as == "nothing":
        return {"skipped": f"{profile.noun} is not for Python; {cite('serving')} says what was compared"}
    task = table.of_adapter(None, base_class(config, base).__name__)
    if task is None:
        known = ", ".join(dict.fromkeys(str(t.peft_type) for t in table.TASKS.values() if t.peft_type))
        return {"skipped": f"task_type={config.task_type} has no probe; {known} and models of images have"}
    name = base or config.base_model_name_or_path
    if not name:
        return {"skipped": "the base model is not known"}
    try:
        return _compare(adapter, folded, name, profile, task)
    except Exception as error:  # whatever a base, or a package that it needs, does: the fold and its proof are made
        return {"skipped": f"it failed on base {name!r}: {first_line(error)}"}


def _compare(adapter: SavedAdapter, folded: Path, base: str, profile: Profile, task: Task) -> dict[str, object]:
    config, model = adapter.config, trained_model(adapter, base)
    batch = task.example(model.config)
    trained = _logits(model, batch)
    del model
    if profile.loads_as == "model":
        found, loader = load_base(base_class(config, base), folded, torch.float32), "transformers"
    else:
        found, loader = _load(folded, config, base, adapter.named), "stock PEFT"
    again = _logits(found, batch)
    for what, logits in (("trained adapter", trained), ("fold", again)):
        if not torch.isfinite(logits).all():
            return {"skipped": f"the logits of the {what} are not finite"}
    return {"base": base, "loaded_by": loader, **logit_error(trained, again)}


def trained_model(adapter: SavedAdapter, base: str | None) -> PeftModel:
    """The adapter on its base in float32, as PEFT loads it.

    Raises:
        OSError, ValueError: the base's weights cannot be had.
    """
    config = adapter.config
    with adapter.for_peft() as folder:
        return _load(folder, config, base or config.base_model_name_or_path, adapter.named)


def _load(adapter: Path, config: PeftConfig, base: str | None, tensors: dict[str, Tensor]) -> PeftModel:
    model = base_model(config, base, torch.float32, tensors)
    with quiet():
        return PeftModel.from_pretrained(model, str(adapter))  # pyright: ignore[reportArgumentType]


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits
