"""Names in `target_modules` that no module has: PEFT is content when any of the others matches."""

from __future__ import annotations

from typing import Any

from torch import nn


def absent_targets(config: Any, model: nn.Module) -> list[str]:
    """The names of the list `target_modules` that are neither a module of the model nor the end of one's name."""
    names = getattr(config, "target_modules", None)
    if not names or isinstance(names, str):
        return []
    there = [f".{name}" for name, _ in model.named_modules()]
    return [name for name in sorted(names) if not any(known.endswith(f".{name}") for known in there)]
