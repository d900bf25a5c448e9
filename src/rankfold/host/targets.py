"""Names in a config that no module has: PEFT is content when any of the others matches."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rankfold.host.peft_api import get_pattern_key


def absent_names(config: Any, there: Collection[str]) -> list[tuple[str, str]]:
    """Field and name for the names that are neither a module of the model nor the end of one's name, and for the patterns that
    match none.

    Args:
        there: names of the model's modules.
    """
    absent = []
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        names = getattr(config, field, None)
        if names and not isinstance(names, str):
            absent += [(field, n) for n in sorted(names) if not any(f".{known}".endswith(f".{n}") for known in there)]
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field, None) or {}:
            if not any(get_pattern_key([pattern], known) == pattern for known in there):
                absent.append((field, pattern))
    return absent
