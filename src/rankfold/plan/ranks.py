"""The rank settings of a method: which field makes it larger, and what follows from it.

Ours say it themselves (`LowRankConfig`); for PEFT's own it stands in peft_methods.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig

from rankfold.errors import RankfoldError
from rankfold.host.config import LowRankConfig
from rankfold.plan.peft_methods import GROWS_WITH, RANKS


@dataclass(frozen=True)
class Setting:
    """The one field that decides how large a method is.

    Args:
        field: its name in the config.
        value: what it is now.
        at: a copy of the config with another value, and with all that follows from it.
    """

    field: str
    value: int
    at: Callable[[int], PeftConfig]

    @property
    def is_rank(self) -> bool:
        """Whether a value above the rank of the largest matrix makes no sense."""
        return self.field in RANKS


def setting(config: PeftConfig) -> Setting:
    """The setting of a config.

    Raises:
        RankfoldError: it has none that a budget could solve for.
    """
    if isinstance(config, LowRankConfig):
        return Setting(config.grows_with, getattr(config, config.grows_with), config.with_rank)
    field = GROWS_WITH.get(str(getattr(config.peft_type, "value", config.peft_type)))
    if field is None:
        raise RankfoldError(
            f"{type(config).__name__}: it has no rank that grows with its parameters; set its fields by hand"
        )
    value: int = getattr(config, field)

    def at(n: int) -> PeftConfig:
        changed: Any = _changed(config, field, n)
        if hasattr(changed, "target_r"):  # the target stays the same share of the start
            changed.target_r = min(max(round(n * changed.target_r / value), 1), n)
        return changed

    return Setting(field, value, at)


def at_the_end(config: PeftConfig) -> PeftConfig | None:
    """The config of a method whose ranks fall to a target, at that target; None for the others."""
    if isinstance(config, LowRankConfig):
        return config.at_the_end()
    target = getattr(config, "target_r", None)
    return None if target is None else _changed(config, setting(config).field, target)


def named(config: PeftConfig) -> dict[str, Any]:
    """The rank settings of a config as a run file writes them; none where nothing can be solved for."""
    if isinstance(config, LowRankConfig):
        return config.ranks()
    try:
        field = setting(config).field
    except RankfoldError:
        return {}
    target = {"target_r": config.target_r} if hasattr(config, "target_r") else {}  # pyright: ignore[reportAttributeAccessIssue]
    return {field: getattr(config, field), **target}


def in_words(config: PeftConfig) -> str:
    """The rank settings in a few letters: "r 8", "r 12 to 8"."""
    if isinstance(config, LowRankConfig):
        return config.ranks_in_words()
    settings = named(config)
    start = next(((("r" if name in RANKS else name), value) for name, value in settings.items()), None)
    if start is None:
        return ""
    target = f" to {settings['target_r']}" if "target_r" in settings else ""
    return f"{start[0]} {start[1]}{target}"


def _changed(config: PeftConfig, field: str, value: int) -> PeftConfig:
    changed = copy.deepcopy(config)
    setattr(changed, field, value)
    return changed
