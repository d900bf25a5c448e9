"""Names in a config that a model has no module or parameter for, and the parameters that a config names."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from rankfold.errors import RankfoldError
from rankfold.host.adapter import Site
from rankfold.host.checkpoint import plain_name
from rankfold.host.kinds import EXPERTS, PARAMETER, kind_of
from rankfold.host.parameter_layer import in_by_out
from rankfold.host.peft_api import get_pattern_key, names_of_experts


def absent_names(config: Any, model: nn.Module) -> list[tuple[str, str]]:
    """Field and name for the names that are neither a module of the model nor the end of one's name, and for the patterns that
    match none. PEFT is content when any of the others matches."""
    modules = [plain_name(name) for name, _ in model.named_modules() if name]
    parameters = [plain_name(name).replace(".base_layer", "") for name, _ in model.named_parameters()]
    absent = []
    known = {"target_modules": [*modules, *names_of_experts(model)], "target_parameters": parameters}
    for field in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save"):
        names = getattr(config, field, None)
        if names and not isinstance(names, str):
            there = known.get(field, modules)
            absent += [(field, n) for n in sorted(names) if not any(f".{one}".endswith(f".{n}") for one in there)]
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field, None) or {}:
            if not any(get_pattern_key([pattern], one) == pattern for one in (*modules, *parameters)):
                absent.append((field, pattern))
    return absent


def parameter_sites(config: Any, name: str, module: nn.Module) -> dict[str, list[Site]]:
    """The parameters of a module that `target_parameters` names, each with where its adapters sit: one per expert.

    Args:
        name: the module's.

    Raises:
        RankfoldError: a parameter that is not a matrix or a stack of them, or that belongs to a module of a kind of its own.
    """
    sites: dict[str, list[Site]] = {}
    for own, p in module.named_parameters(recurse=False):
        full = f"{name}.{own}"
        if not any(f".{full}".endswith(f".{target}") for target in config.target_parameters or ()):
            continue
        if _excluded(config, name) or _excluded(config, full):
            continue
        what = f"{type(config).__name__}: target_parameters: {full}"
        if kind_of(module) is not None:
            raise RankfoldError(f"{what} is of a {type(module).__name__}; name {name} in target_modules instead")
        if p.ndim not in (2, 3):
            raise RankfoldError(f"{what} has {p.ndim} dimensions; matrices and stacks of matrices can be adapted")
        sites[own] = sites_of_parameter(name, module, own)
    return sites


def _excluded(config: Any, name: str) -> bool:
    """As PEFT reads `exclude_modules` for modules: a regex of the whole name, or a list of what names end in."""
    given = config.exclude_modules
    if isinstance(given, str):
        return re.fullmatch(given, name) is not None
    return any(f".{name}".endswith(f".{end}") for end in given or ())


def sites_of_parameter(name: str, module: nn.Module, own: str) -> list[Site]:
    """Where the adapters of a module's parameter sit: one per expert of a stack of matrices.

    Args:
        name: the module's.
        own: the parameter's, in it.
    """
    shape = module.get_parameter(own).shape
    out, into = shape[-2:]
    if len(shape) == 2:
        return [Site(f"{name}.{own}", into, out, PARAMETER.name)]
    out, into = (into, out) if in_by_out(module) else (out, into)
    return [Site(f"{name}.{i}.{own}", into, out, EXPERTS.name) for i in range(shape[0])]
