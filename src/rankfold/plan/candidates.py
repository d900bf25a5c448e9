"""What a plan compares: every method of rankfold, and rivals from PEFT; how they are written on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peft import PeftConfig
from torch import nn

from rankfold.errors import RankfoldError, nearest
from rankfold.host import registry
from rankfold.host.config import LowRankConfig
from rankfold.host.field_types import bad_pattern
from rankfold.plan.peft_methods import NEEDED, RIVALS, fields_at
from rankfold.runfile.methods import SET_BY_THE_RUN, config_class, config_fields
from rankfold.runfile.peft_methods import ALIASES
from rankfold.runfile.yaml import YamlError, read
from rankfold.tasks import table


@dataclass(frozen=True)
class Candidate:
    """One method with fields.

    Args:
        label: what the table calls it.
        name: as in a run file.
        fields: of its config, as in a run file.
    """

    label: str
    name: str
    fields: dict[str, Any] = field(default_factory=dict)

    def with_rank(self, r: int) -> Candidate:
        """At rank r where its own fields give none; a method whose ranks fall ends there."""
        cls: Any = config_class(self.name)
        ranks = cls.fields_at(r) if issubclass(cls, LowRankConfig) else fields_at(self.name, r)
        if self.fields.keys() & ranks.keys() or not ranks.keys() <= config_fields(cls).keys():
            return self
        return replace(self, fields={**self.fields, **ranks})

    def config(self, base: nn.Module, task: str | None, targets: list[str] | str) -> PeftConfig:
        """Its config on a model.

        Raises:
            RankfoldError: fields that the config refuses.
        """
        cls: Any = config_class(self.name)
        needed = {key: value for key, (value, _) in NEEDED.get(self.name, {}).items()}
        made = cls.planned if issubclass(cls, LowRankConfig) else cls
        row = table.get(task) if task else None
        given = {**needed, "target_modules": targets, **self.fields}
        try:
            config = made(task_type=row.peft_type if row else None, **given)
        except (TypeError, AttributeError) as error:
            raise RankfoldError(f"{self.label}: {error}") from None
        if row is not None and row.new_head:
            from rankfold.train import model

            model.keep(config, model.heads(base))  # pyright: ignore[reportArgumentType]
        return config


def everyone() -> list[Candidate]:
    """Each method of `rankfold methods`, and PEFT's best known."""
    ours = [
        Candidate(label, row.name, dict(fields))
        for row in registry.find()
        for label, fields in (row.variants or {row.name: {}}).items()
    ]
    return [*ours, *(parse(name) for name in RIVALS)]


def parse(text: str) -> Candidate:
    """A candidate as the command line writes it: NAME, or NAME:field=value,…

    >>> parse("peft:dora:r=4")
    Candidate(label='peft:dora', name='peft:lora', fields={'use_dora': True, 'r': 4})

    Raises:
        RankfoldError: no such method or field, or no value.
    """
    prefix, _, rest = text.partition(":") if text.startswith("peft:") else ("", "", text)
    label, _, given = rest.partition(":")
    label = f"{prefix}:{label}" if prefix else label
    name, fields = ALIASES.get(label, (label, {}))
    known, fields = config_fields(config_class(name)), dict(fields)
    for key, value in written(text, given, f"{label}:r=8").items():
        if key not in known or key in SET_BY_THE_RUN:
            raise RankfoldError(f"'{text}': {label} has no field '{key}'{nearest(key, known)}")
        if why := bad_pattern(key, value):
            raise RankfoldError(f"'{text}': {key}={why}")
        fields[key] = value
    return Candidate(label, name, fields)


def written(text: str, given: str, example: str) -> dict[str, Any]:
    """The values of "field=value,…"; raises RankfoldError, which quotes the whole `text`, where they are not written so."""
    fields = {}
    for pair in filter(None, (part.strip() for part in given.split(","))):
        key, equals, value = pair.partition("=")
        if not equals or not value:
            raise RankfoldError(f"'{text}': '{pair}' must look like field=value, as in {example}")
        try:
            fields[key], _ = read(value)
        except YamlError as error:
            raise RankfoldError(f"'{text}': {key}={value} is {error}") from None
    return fields


def chosen(names: Sequence[str] | None) -> list[Candidate]:
    """Those named, or everyone. Raises RankfoldError as `parse`."""
    return [parse(name) for name in names] if names else everyone()
