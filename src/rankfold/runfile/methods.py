"""What a run file may say of a method: its name, and the fields of its config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rankfold.errors import RankfoldError, nearest
from rankfold.runfile.peft_methods import ALIASES, EXAMPLES, REFUSED, SCHEDULED

if TYPE_CHECKING:
    from peft import PeftConfig

# What the run decides from the task and the model; a run file that set them could only contradict itself.
SET_BY_THE_RUN = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "grown",
}


def config_class(name: str) -> type[PeftConfig]:
    """The config class of a method's name, ours or, as peft:NAME, PEFT's.

    Raises:
        ValueError: no such method; the message names the nearest.
    """
    if not name.startswith("peft:"):
        from rankfold.host import registry

        return registry.get(name).config
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from rankfold.host.peft_api import peft_name

    classes = {f"peft:{kind.value.lower()}": config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name = ALIASES.get(name, (name, {}))[0]
    classes = {name: cls for name, cls in classes.items() if not name.startswith(f"peft:{peft_name('')}")}
    if name not in classes:
        raise RankfoldError(
            f"PEFT has no method '{name.removeprefix('peft:')}'{nearest(name, [*classes, *ALIASES], 'known')}"
        )
    return classes[name]


def refuse(name: str) -> None:
    """Raises RankfoldError for a method that a run file cannot train."""
    if name in REFUSED:
        raise RankfoldError(f"'{name}' cannot be trained by a run file: {REFUSED[name]}")


def config_fields(config: type) -> dict[str, dataclasses.Field]:
    """The fields of a method's config that a run file may set."""
    return {f.name: f for f in dataclasses.fields(config) if f.init and f.name not in SET_BY_THE_RUN}


def preset(name: str) -> dict[str, Any]:
    """The fields that the name itself sets: peft:dora is peft:lora with use_dora."""
    return dict(ALIASES.get(name, (name, {}))[1])


def example(name: str) -> dict[str, Any]:
    """The fields that a short first run of the method sets beside LoRA's; None takes one of those away."""
    if name.startswith("peft:"):
        return EXAMPLES.get(name, {})
    from rankfold.host import registry

    return dict(registry.get(name).example or {})


def scheduled(name: str, fields: Mapping[str, Any]) -> bool:
    """Whether the method chooses its ranks while it trains."""
    from rankfold.host import registry

    row = registry.METHODS.get(name)
    return cannot_resume(name, fields) or (row is not None and row.controller is not None)


def cannot_resume(name: str, fields: Mapping[str, Any]) -> bool:
    """Whether a checkpoint lacks what the method chooses its ranks by, so that nothing can go on from one."""
    switch = SCHEDULED.get(name)
    return name in SCHEDULED and (switch is None or bool(fields.get(switch)))
