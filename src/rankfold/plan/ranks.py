"""The rank settings of each method: which number makes it larger, and what goes with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig

from rankfold.errors import RankfoldError
from rankfold.methods.gated import BudgetConfig
from rankfold.methods.rasa import RasaConfig

#: PEFT's types whose trained numbers grow with one field, and the field. The others have none, or shrink with it.
FIELDS = {
    "ADALORA": "init_r",
    "DELORA": "r",
    "FOURIERFT": "n_frequency",
    "HIRA": "r",
    "HRA": "r",
    "LOHA": "r",
    "LOKR": "r",
    "LORA": "r",
    "MISS": "r",
    "SHIRA": "r",
    "VBLORA": "r",
    "VERA": "r",
    "WAVEFT": "n_frequency",
}


@dataclass(frozen=True)
class Setting:
    """The one number that decides how large a method is.

    Args:
        field: its name in the config.
        value: what it is now.
        at: a copy of the config with another value, and with all that follows from it.
        is_rank: whether more than the rank of the largest matrix is without sense.
    """

    field: str
    value: int
    at: Callable[[int], PeftConfig]

    @property
    def is_rank(self) -> bool:
        return self.field in ("r", "init_r")


def setting(config: PeftConfig) -> Setting:
    """The setting of a config.

    Raises:
        ValueError: it has none that a budget could solve for.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    name = "r" if hasattr(config, "share_dropout") else FIELDS.get(kind)
    if name is None:
        raise RankfoldError(
            f"{type(config).__name__}: it has no rank that grows with its parameters; set its fields by hand"
        )
    value: int = getattr(config, name)

    def at(n: int) -> PeftConfig:
        changed: Any = copy.deepcopy(config)
        setattr(changed, name, n)
        if isinstance(changed, BudgetConfig):
            changed.target_r = _same_share(n, value, changed.target_r)
        if kind == "ADALORA":
            changed.target_r = _same_share(n, value, changed.target_r)
        if isinstance(changed, RasaConfig) and changed.shared_rank is not None:
            changed.shared_rank = min(changed.shared_rank, n)
        if hasattr(changed, "check"):
            changed.check()
        return changed

    return Setting(name, value, at)


def _same_share(start: int, start_before: int, target_before: int) -> int:
    """The target rank that is the same share of the start rank."""
    return min(max(round(start * target_before / start_before), 1), start)


def at_the_end(config: PeftConfig) -> PeftConfig | None:
    """The config of a method whose ranks fall to a target, at that target; None for the others."""
    target = getattr(config, "target_r", None)
    if target is None:
        return None
    ended: Any = copy.deepcopy(config)
    setattr(ended, setting(config).field, target)
    return ended


def named(config: PeftConfig) -> dict[str, Any]:
    """The rank settings of a config as a run file writes them.

    >>> named(RasaConfig(r=16))
    {'r': 16, 'shared_rank': 2}
    """
    if isinstance(config, RasaConfig):
        return {"r": config.r, "shared_rank": config.pooled(config.r)}
    try:
        name = setting(config).field
    except ValueError:
        return {}
    target = {"target_r": config.target_r} if hasattr(config, "target_r") else {}  # pyright: ignore[reportAttributeAccessIssue]
    return {name: getattr(config, name), **target}


def short(method: dict[str, Any]) -> str:
    """The rank settings of a run file's method in a few letters.

    >>> short({"name": "rasa", "r": 7, "shared_rank": 1}), short({"name": "adalora", "r": 12, "target_r": 8})
    ('r 7, k 1', 'r 12 to 8')
    """
    start = next((f"{'r' if n in ('r', 'init_r') else n} {method[n]}" for n in _SETTINGS if n in method), "")
    pool = f", k {method['shared_rank']}" if "shared_rank" in method else ""
    target = f" to {method['target_r']}" if "target_r" in method else ""
    return start + pool + target


_SETTINGS = ("init_r", "r", "n_frequency")
