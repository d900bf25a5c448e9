"""What a plan compares: every method of rankfold, and rivals from PEFT; how they are written on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import yaml
from peft import PeftConfig
from torch import nn

from rankfold.errors import RankfoldError, nearest
from rankfold.host import registry
from rankfold.plan.basis import PlannedCoraConfig
from rankfold.runfile.methods import SET_BY_THE_RUN, config_class, config_fields
from rankfold.tasks import table

#: Names that PEFT's users know, for a field of its LoRA.
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "peft:rslora": ("peft:lora", {"use_rslora": True}),
    "peft:dora": ("peft:lora", {"use_dora": True}),
}
RIVALS = ("peft:lora", "peft:rslora", "peft:dora", "peft:adalora", "peft:vera", "peft:loha", "peft:lokr")
#: What a config cannot do without and a plan does not depend on.
_NEEDED = {"peft:adalora": {"total_step": 1000}}


@dataclass(frozen=True)
class Contender:
    """One method with fields.

    Args:
        label: what the table calls it.
        name: as in a run file.
        fields: of its config, as in a run file.
    """

    label: str
    name: str
    fields: dict[str, Any] = field(default_factory=dict)

    def with_rank(self, r: int) -> Contender:
        """At rank r where its own fields give none; a method whose ranks fall ends there and starts at 1.5 r, as papers do."""
        start = max(round(1.5 * r), r)
        ranks: dict[str, Any] = {
            "adalora": {"r": start, "target_r": r},
            "dynamic_dora": {"r": start, "target_r": r},
            "peft:adalora": {"init_r": start, "target_r": r},
        }.get(self.name, {"r": r})
        if self.fields.keys() & ranks.keys() or not ranks.keys() <= config_fields(config_class(self.name)).keys():
            return self
        return replace(self, fields={**self.fields, **ranks})

    def config(self, base: nn.Module, task: str | None, targets: list[str] | str) -> PeftConfig:
        """Its config on a model.

        Raises:
            ValueError: fields that the config refuses.
        """
        cls: Any = config_class(self.name)
        if self.name == "cora" and not self.fields.get("basis"):
            cls = PlannedCoraConfig
        given = {**_NEEDED.get(self.name, {}), "target_modules": targets, **self.fields}
        row = table.get(task) if task else None
        try:
            config = cls(task_type=row.peft_type if row else None, **given)
        except (TypeError, AttributeError) as error:
            raise RankfoldError(f"{self.label}: {error}") from None
        if row is not None and row.new_head:
            from rankfold.train import model

            model.keep(config, model.heads(base))  # pyright: ignore[reportArgumentType]
        return config


def everyone() -> list[Contender]:
    """Each method of `rankfold methods`, and PEFT's best known."""
    ours = [Contender(name, name) for name in sorted(registry.METHODS)]
    at = next((i for i, c in enumerate(ours) if c.name == "cora"), None)
    if at is not None:
        ours[at : at + 1] = [Contender("cora 1", "cora", {"approach": 1}), Contender("cora 2", "cora", {"approach": 2})]
    return [*ours, *(parse(name) for name in RIVALS)]


def parse(text: str) -> Contender:
    """A contender as the command line writes it: NAME, or NAME:field=value,…

    >>> parse("peft:dora:r=4")
    Contender(label='peft:dora', name='peft:lora', fields={'use_dora': True, 'r': 4})

    Raises:
        ValueError: no such method or field, or no value.
    """
    prefix, _, rest = text.partition(":") if text.startswith("peft:") else ("", "", text)
    label, _, given = rest.partition(":")
    label = f"{prefix}:{label}" if prefix else label
    name, fields = ALIASES.get(label, (label, {}))
    known, fields = config_fields(config_class(name)), dict(fields)
    for pair in filter(None, (part.strip() for part in given.split(","))):
        key, equals, value = pair.partition("=")
        if not equals or not value:
            raise RankfoldError(f"'{text}': '{pair}' must look like field=value, as in lora:r=8")
        if key not in known or key in SET_BY_THE_RUN:
            raise RankfoldError(f"'{text}': {label} has no field '{key}'{nearest(key, known)}")
        fields[key] = yaml.safe_load(value)
    return Contender(label, name, fields)


def chosen(names: Sequence[str] | None) -> list[Contender]:
    """Those named, or everyone. Raises ValueError as `parse`."""
    return [parse(name) for name in names] if names else everyone()
