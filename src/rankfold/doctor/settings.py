"""The numbers of an adapter's config that decide its scale and its targets, with every type checked."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar

from peft.tuners.tuners_utils import check_target_module_exists

from rankfold.doctor.adapter_file import AdapterFile
from rankfold.doctor.findings import Finding, Status
from rankfold.text import short_repr

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What PEFT would take from the config; its defaults where a key is absent or unusable."""

    peft_type: str = "LORA"
    r: int = 8
    lora_alpha: float = 8.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] = field(default_factory=list)
    target_parameters: list[str] = field(default_factory=list)
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def rank(self, module: str) -> int:
        """The rank that the config gives a module, by PEFT's rule: the first pattern that matches the end of its name."""
        return _first(self.rank_pattern, _adapted(module), self.r)

    def alpha(self, module: str) -> float:
        return _first(self.alpha_pattern, _adapted(module), self.lora_alpha)

    def scale(self, module: str) -> float:
        """The factor of up · down with which the adapter was trained."""
        return scale(self.alpha(module), self.rank(module), self.use_rslora)

    def targets(self, module: str) -> bool:
        """Whether the config names the module, by PEFT's own rule: target_modules, less exclusions and other layers."""
        # PEFT has put the names of the linear layers in the place of "all-linear" before it asks
        module = _adapted(module)
        given = [module] if self.target_modules == "all-linear" else self.target_modules or []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in _regex
            return bool(check_target_module_exists(replace(self, target_modules=given, modules_to_save=[]), module))


def _adapted(module: str) -> str:
    """The module whose adapter holds the factors: PEFT adapts an nn.MultiheadAttention as a whole, and its out_proj inside."""
    return module.partition(".base_layer.")[0]


def scale(alpha: float, rank: int, rslora: bool = False) -> float:
    return alpha / (math.sqrt(rank) if rslora else rank)


def read_settings(file: AdapterFile) -> tuple[Settings, list[Finding]]:
    """The settings, and a problem for each value that is not of its type."""
    problems: list[Finding] = []

    def get(key: str, default: Any, right: Callable[[Any], bool], wanted: str) -> Any:
        value = file.config.get(key)
        if value is None:
            return default
        if right(value):
            return value
        what = f"{key}={short_repr(value)} must be {wanted}"
        problems.append(Finding(Status.PROBLEM, what, file.where(key), f"write {wanted}"))
        return default

    r = get("r", 8, _is_rank, "a positive integer")
    rank_pattern = get("rank_pattern", {}, _pattern(_is_rank), "an object of name pattern: positive integer")
    alpha_pattern = get("alpha_pattern", {}, _pattern(_is_number), "an object of name pattern: number")
    targets = get("target_modules", None, _are_targets, "a list of names, or one valid regular expression")
    return Settings(
        peft_type=get("peft_type", "LORA", lambda v: isinstance(v, str), "a string"),
        r=r,
        lora_alpha=float(get("lora_alpha", 8, _is_number, "a number")),
        use_rslora=get("use_rslora", False, lambda v: isinstance(v, bool), "true or false"),
        rank_pattern=rank_pattern,
        alpha_pattern={k: float(v) for k, v in alpha_pattern.items()},
        target_modules=targets,
        modules_to_save=get("modules_to_save", [], _are_names, "a list of names"),
        target_parameters=get("target_parameters", [], _are_names, "a list of names"),
        exclude_modules=get("exclude_modules", None, _are_targets, "a list of names, or one valid regular expression"),
        layers_to_transform=get("layers_to_transform", None, _are_layers, "a number or a list of numbers"),
        layers_pattern=get("layers_pattern", None, _are_patterns, "a name or a list of names"),
    ), problems


def _first(pattern: dict[str, T], module: str, default: T) -> T:
    return next((v for key, v in pattern.items() if _regex(rf"(.*\.)?({key})$").match(module)), default)


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a strange pattern is the adapter's affair
        return re.compile(pattern)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _are_targets(value: Any) -> bool:
    return _are_names(value) or (isinstance(value, str) and _compiles(value))


def _are_layers(value: Any) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) for v in (value if isinstance(value, list) else [value]))


def _are_patterns(value: Any) -> bool:
    return all(isinstance(v, str) and _compiles(v) for v in (value if isinstance(value, list) else [value]))


def _pattern(right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict) and all(_compiles(rf"(.*\.)?({k})$") and right(v) for k, v in value.items())
    )


def _compiles(pattern: str) -> bool:
    try:
        _regex(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True
