"""The table of methods: one row each, listed, found with wildcards, and registered with PEFT at import.

A row comes from `rankfold.methods`, from an entry point of the group of that name, or from whoever calls `register`.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peft.utils import register_peft_method
from torch import nn

from rankfold.errors import RankfoldError
from rankfold.host.adapter import Adapter
from rankfold.host.checkpoint import PREFIX
from rankfold.host.config import LowRankConfig
from rankfold.host.peft_api import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    add_peft_type,
    peft_name,
)
from rankfold.host.plugins import GROUP, announced
from rankfold.host.tuner import LowRankTuner


@dataclass(frozen=True)
class Method:
    """What is known of a method without making one.

    Args:
        name: what run files, `rankfold methods` and `config.method` call it.
        title: what the paper calls it.
        paper: arXiv id.
        summary: one line.
        config, adapter: its classes. A config class belongs to one method; several may have one adapter class.
        controller: acts around the optimiser's step; None for a method without a schedule.
        folds_at: the rank of the folded LoRA, as a formula for people.
        variants: fields by the label of a row, for a method that a plan lists more than once.
        starter: whether a new compare file names it beside LoRA.
        example: fields for a short first run of about the size of LoRA at r = 8; a value of None removes a field that other
            methods get.
        next_task: for a method with a rule of its own for learning one task after another: ends a task of the named adapter of a
            model, begins the next one, and returns the new config. Without it, the same adapter just goes on.
        end_task: what such a method does to a trained task before it is measured and saved, where it does something.
        approximate: for a method whose update may depend on the input: makes the named adapter of a model a fixed one in place, by
            one of the config's `approximations`: (model, rule, adapter name) → a function that takes it back when called, and makes
            it again when called again.
    """

    name: str
    title: str
    paper: str
    summary: str
    config: type[LowRankConfig]
    adapter: type[Adapter]
    controller: type | None = None
    folds_at: str = "r"
    variants: Mapping[str, Mapping[str, Any]] | None = None
    starter: bool = False
    example: Mapping[str, Any] | None = None
    next_task: Callable[[nn.Module, str], LowRankConfig] | None = None
    end_task: Callable[[nn.Module, str], None] | None = None
    approximate: Callable[[nn.Module, str, str], Callable[[], None]] | None = None

    @property
    def foldable(self) -> bool:
        """Whether a plain LoRA equals it exactly, with some of its configs at least."""
        return self.config.fixed is not False


#: All rows by name, those of entry points included.
METHODS: dict[str, Method]

_ROWS: dict[str, Method] = {}
_TUNER = "_tuner"
_discovered = False


def __getattr__(name: str) -> Any:
    if name == "METHODS":
        discover()
        return _ROWS
    if name.endswith(_TUNER):  # pickle finds a tuner by this module and its class's name
        discover()
        if (row := _ROWS.get(name.removesuffix(_TUNER))) is not None:
            return PEFT_TYPE_TO_TUNER_MAPPING[row.config.peft_kind()]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def discover() -> None:
    """Registers what comes with rankfold and what entry points name; done once, at the first question."""
    global _discovered
    if _discovered:
        return
    _discovered = True
    importlib.import_module(GROUP)
    for found in announced():
        if isinstance(found, Method):
            register(found)


def register(method: Method) -> Method:
    """Adds a row and makes it a PEFT method.

    Registering a row twice is harmless. A config class that was defined anew – a notebook's cell run again – takes the
    place of the class of the same module and name, in PEFT's tables too.

    Raises:
        RankfoldError: another module's method of that name, a name that cannot stand in files, or a config whose `method`
            is not the row's name.
    """
    before = _ROWS.get(method.name)
    if before == method:
        return method
    if before is not None and _origin(before) != _origin(method):
        raise RankfoldError(
            f"Method: name={method.name!r} is taken by {before.title} ({'.'.join(_origin(before))}); choose another"
        )
    if not re.fullmatch("[a-z][a-z0-9_]*[a-z0-9]", method.name):
        raise RankfoldError(
            f"Method: name={method.name!r} must be lower-case letters, digits and single words joined by _"
        )
    if method.config.method != method.name:
        raise RankfoldError(f"Method: {method.config.__name__}.method={method.config.method!r} must be {method.name!r}")
    kind = add_peft_type(peft_name(method.name))
    for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        table.pop(kind, None)
    members = {"adapter_cls": method.adapter, "__module__": __name__}
    tuner = type(f"{method.name}{_TUNER}", (LowRankTuner,), members)
    register_peft_method(name=peft_name(method.name), config_cls=method.config, model_cls=tuner, prefix=PREFIX)
    method.config.scheduled = method.controller is not None
    _ROWS[method.name] = method
    return method


def _origin(method: Method) -> tuple[str, str]:
    """Where a method was defined: that of its config class, which no other method has."""
    return method.config.__module__, method.config.__qualname__


def get(name: str) -> Method:
    """The row called `name`; raises RankfoldError that names the nearest."""
    discover()
    if name not in _ROWS:
        near = difflib.get_close_matches(name, _ROWS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "there are " + ", ".join(sorted(_ROWS))
        raise RankfoldError(f"method={name!r} is not known; {hint}")
    return _ROWS[name]


def find(pattern: str = "*") -> list[Method]:
    """The rows whose name matches a shell wildcard, by name."""
    discover()
    return [_ROWS[n] for n in sorted(_ROWS) if fnmatch.fnmatchcase(n, pattern)]


def unknown_type(peft_type: object) -> str:
    """Why PEFT knows no adapter of this `peft_type`, and what would help, in one sentence."""
    name = str(peft_type).lower().removeprefix(peft_name(""))
    if name == str(peft_type).lower():
        return f"peft_type={peft_type!r} is not known to PEFT or rankfold"
    return (
        f"peft_type={peft_type!r} is of the method {name!r}, which is not registered here; name the module or file that "
        "registers it with --import, or import it first"
    )
