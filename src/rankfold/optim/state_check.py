"""An optimiser's state dict: whether it belongs to this optimiser, and restoring it to the last bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import RankfoldError


def check_state(
    optimizer: torch.optim.Optimizer,
    state_dict: Mapping[str, Any],
    expected: Mapping[nn.Parameter, Mapping[str, tuple[int, ...]]],
) -> None:
    """Raises RankfoldError where `state_dict` is not a state of `optimizer`: another model, rank, optimiser or mode.

    Args:
        expected: names and shapes of the tensors kept for a parameter. What is not named here has the shape of its parameter.
    """
    for difference in _differences(optimizer, state_dict, expected):
        raise RankfoldError(
            f"{type(optimizer).__name__}: the state to load is that of another model, rank or optimiser ({difference}); resume "
            "with the model, adapter config and optimiser options that it was saved with"
        )


def restore_types(
    optimizer: torch.optim.Optimizer,
    state_dict: Mapping[str, Any],
    expected: Mapping[nn.Parameter, Mapping[str, tuple[int, ...]]],
) -> None:
    """Puts back the tensors of a state that torch has just loaded, because it has cast them to the parameters' type.

    Args:
        expected: as in `check_state`. The state of other parameters must have their type, also where it was saved in another.
    """
    for saved_id, p in _matched(optimizer, state_dict):
        for name, value in state_dict["state"].get(saved_id, {}).items() if p in expected else ():
            if isinstance(value, Tensor):
                optimizer.state[p][name] = value.detach().to(p.device, copy=True)


def _matched(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> Iterator[tuple[int, nn.Parameter]]:
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        yield from zip(saved["params"], group["params"], strict=True)


def _differences(
    optimizer: torch.optim.Optimizer,
    state_dict: Mapping[str, Any],
    expected: Mapping[nn.Parameter, Mapping[str, tuple[int, ...]]],
) -> Iterator[str]:
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        yield "it has no param_groups and state"
        return
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if len(groups) != len(saved_groups):
        yield f"it has {len(saved_groups)} parameter groups, here are {len(groups)}"
        return
    for i, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        for here, there in zip(group.get("pairs", ()), saved.get("pairs", ()), strict=False):
            if list(here) != list(there):
                yield f"a pair is {_pair(there)}, here it is {_pair(here)}"
        if len(group["params"]) != len(saved["params"]):
            yield f"its group {i} has {len(saved['params'])} parameters, here are {len(group['params'])}"
        for name, value in group.items():
            if isinstance(value, str) and saved.get(name) != value:
                yield f"its {name} is {saved.get(name)!r}, here it is {value!r}"
    for saved_id, p in _matched(optimizer, state_dict):
        entry = state_dict["state"].get(saved_id, {})
        tensors = {k: tuple(v.shape) for k, v in entry.items() if isinstance(v, Tensor) and k != "step"}
        shapes = dict(expected.get(p, {name: tuple(p.shape) for name in tensors}))
        if entry and tensors != shapes:
            yield f"of one parameter it keeps {tensors}, here are {shapes}"


def _pair(described: Any) -> str:
    name, out, in_, rank = described
    return f"{name} ({out}×{in_}, rank {rank})"
