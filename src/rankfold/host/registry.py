"""The table of methods: one row each, listed, found with wildcards, and registered with PEFT at import."""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import dataclass

from peft.utils import register_peft_method

from rankfold.errors import RankfoldError
from rankfold.host.adapter import Adapter
from rankfold.host.config import LowRankConfig
from rankfold.host.peft_api import PEFT_TYPE_TO_CONFIG_MAPPING, add_peft_type, peft_name
from rankfold.host.tuner import PREFIX, LowRankTuner


@dataclass(frozen=True)
class Method:
    """What is known of a method without making one.

    Args:
        name: what run files, `rankfold methods` and `config.method` call it.
        title: what the paper calls it.
        paper: arXiv id.
        summary: one line.
        config, adapter: its classes.
        controller: what acts around the optimiser's step, or None for a method with no schedule.
        folds_at: the rank of the folded LoRA, as a formula for people.
    """

    name: str
    title: str
    paper: str
    summary: str
    config: type[LowRankConfig]
    adapter: type[Adapter]
    controller: type | None = None
    folds_at: str = "r"

    @property
    def foldable(self) -> bool:
        """Whether a plain LoRA equals it exactly."""
        return self.adapter.fixed


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Adds a row and makes it a PEFT method; registering the same row twice is harmless.

    Raises:
        ValueError: another method of that name, or a config whose `method` is not the row's name.
    """
    if METHODS.get(method.name) == method:
        return method
    if method.name in METHODS:
        raise RankfoldError(f"Method: name={method.name!r} is taken by {METHODS[method.name].title}; choose another")
    if method.config.method != method.name:
        raise RankfoldError(f"Method: {method.config.__name__}.method={method.config.method!r} must be {method.name!r}")
    name = peft_name(method.name)
    if add_peft_type(name) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        tuner = type(
            f"{method.adapter.__name__}Model", (LowRankTuner,), {"adapter_cls": method.adapter, "__module__": __name__}
        )
        globals()[tuner.__name__] = tuner  # pickle finds a class by its module and name
        register_peft_method(name=name, config_cls=method.config, model_cls=tuner, prefix=PREFIX)
    method.adapter.has_schedule = method.controller is not None
    METHODS[method.name] = method
    return method


def get(name: str) -> Method:
    """The row called `name`; raises ValueError that names the nearest."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "there are " + ", ".join(sorted(METHODS))
        raise RankfoldError(f"method={name!r} is not known; {hint}")
    return METHODS[name]


def find(pattern: str = "*") -> list[Method]:
    """The rows whose name matches a shell wildcard, by name."""
    return [METHODS[n] for n in sorted(METHODS) if fnmatch.fnmatchcase(n, pattern)]
