"""A commented run file to start from, written from the descriptions of the fields themselves."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from rankfold.host.config import LowRankConfig
from rankfold.runfile.methods import config_class, config_fields, example, preset, refuse
from rankfold.runfile.schema import Data, Model, Training
from rankfold.runfile.yaml import read
from rankfold.tasks import table

WIDTH = 100


def template(task: str, method: str, imports: Sequence[str] = (), learning_rate: float | None = None) -> str:
    """The text of a run file for a task and a method.

    Args:
        imports: what registers the method, where it does not come with rankfold.
        learning_rate: a first one for this method; by default the task's for LoRA.

    Raises:
        RankfoldError: no such task or method; the message names the nearest.
    """
    start = table.get(task).start
    refuse(method)
    config = config_class(method)
    training = start["training"] | ({} if learning_rate is None else {"learning_rate": learning_rate})
    return "\n".join(
        [
            "# rankfold train run.yaml              train            (--dry-run: print the plan only)",
            "# rankfold train run.yaml training.seed=1               change a value for one run",
            "# rankfold validate run.yaml           check this file",
            "# A line that begins with # and a key shows the default of that key.",
            "",
            *_section("model", Model, start["model"]),
            f"task: {task}",
            "",
            *_section("data", Data, start["data"]),
            *([f"imports: {json.dumps(list(imports))}", ""] if imports else []),
            "method:",
            f"  name: {method}",
            *_method_fields(config, start["method"] | preset(method) | example(method)),
            "",
            *_section("training", Training, training),
            "# Folder of this run: adapter, checkpoints, metrics, model card. Must not exist yet.",
            f"output: runs/{start['data']['source']}-{method.replace(':', '-')}",
            "",
        ]
    )


def _section(name: str, section: type[BaseModel], values: dict[str, Any]) -> list[str]:
    lines = [f"{name}:"]
    for key, field in section.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            default = default.model_dump(exclude_none=True)
        lines += _entry(key, field.description or "", values, None if field.is_required() else default)
    return [*lines, ""]


def _method_fields(config: type, values: dict[str, Any]) -> list[str]:
    known = config_fields(config)
    # The fields that make the method what it is stand in every file, the rest of LoraConfig's is in its documentation.
    classes = [c for c in config.__mro__ if c is config or (issubclass(c, LowRankConfig) and c is not LowRankConfig)]
    own = [f for c in reversed(classes) for f in vars(c).get("__annotations__", {}) if f in known]
    lines = []
    values = {key: value for key, value in values.items() if value is not None}
    if issubclass(config, LowRankConfig):  # PEFT's examples are sentences
        values = {**values, **{key: known[key].metadata["example"] for key in own if "example" in known[key].metadata}}
    if getattr(config, "default_targets", None) not in (None, LowRankConfig.default_targets):
        values.pop("target_modules", None)  # the method knows them better
    for key in dict.fromkeys([*values, *own]):
        if key in known:
            field = known[key]
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            lines += _entry(key, field.metadata.get("help", ""), values, default)
    return lines


def _entry(key: str, description: str, values: dict[str, Any], default: Any) -> list[str]:
    """A key with its description above it; commented out if only its default could be shown."""
    text = " ".join("".join(description).split())  # PEFT has descriptions that are tuples
    comment = [f"  # {line}" for line in textwrap.wrap(text, WIDTH - 4)]
    value = f"{key}: {_yaml(values.get(key, default))}"
    return [*comment, f"  {value}" if key in values else f"  #{value}"]


def _yaml(value: Any) -> str:
    if isinstance(value, dict) and value:
        return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str) and value.replace("-", "").isalnum() and read(value)[0] == value:
        return value
    return json.dumps(value, default=str)
