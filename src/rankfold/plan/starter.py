"""The first learning rate that `rankfold init` writes into a run file."""

from __future__ import annotations

from typing import Any

from rankfold.errors import RankfoldError
from rankfold.host.config import LowRankConfig
from rankfold.plan.first_rate import first_rate, lora_rate_of
from rankfold.runfile.methods import config_class, config_fields, example, preset, refuse
from rankfold.tasks import table


def learning_rate(task: str, method: str) -> float | None:
    """The first rate of the run file that `template` writes, or None for a method whose steps cannot be measured.

    Raises:
        RankfoldError: no such task or method.
    """
    start = table.get(task).start
    refuse(method)
    cls: Any = config_class(method)
    given = start["method"] | preset(method) | example(method)
    fields = {k: v for k, v in given.items() if v is not None and k in config_fields(cls)}
    try:
        config = (cls.planned if issubclass(cls, LowRankConfig) else cls)(**fields)
        return first_rate(config, lora_rate=lora_rate_of(task))
    except (RankfoldError, ValueError, TypeError):
        return None
