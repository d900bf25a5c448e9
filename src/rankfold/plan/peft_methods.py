"""What a plan must know about PEFT's own methods, because their configs cannot tell it."""

from __future__ import annotations

import math
from typing import Any

#: The best known, which a plan compares ours with.
RIVALS = ("peft:lora", "peft:rslora", "peft:dora", "peft:adalora", "peft:vera", "peft:loha", "peft:lokr")
#: Fields that a config requires although a plan does not depend on them, and their meaning for a run file's reader.
NEEDED: dict[str, dict[str, tuple[Any, str]]] = {
    "peft:adalora": {"total_step": (1000, "the optimiser steps of your run")},
}
#: PEFT's types whose trained parameters grow with one field, and the field. The others have none, or shrink with it.
GROWS_WITH = {
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
#: Fields that count ranks, of which a matrix has no more than its shape allows.
RANKS = ("r", "init_r")


def fields_at(name: str, r: int) -> dict[str, int]:
    """The fields that stand for "rank r"; where ranks fall, they end there and start at 1.5 r, as papers do."""
    return {"init_r": math.ceil(1.5 * r), "target_r": r} if name == "peft:adalora" else {"r": r}
