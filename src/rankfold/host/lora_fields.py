"""What the fields of PEFT's LoraConfig mean to rankfold's configs that lack them: a default is taken, anything else refused with a reason.

SomeConfig(r=8, use_dora=True)     # RankfoldError: ... use_dora=True is not supported: ...
"""

from __future__ import annotations

import dataclasses
from typing import Any

from peft import LoraConfig

from rankfold.errors import RankfoldError

_OF_LORA = {f.name: f for f in dataclasses.fields(LoraConfig)}

#: Why not, and what to do instead.
_WHY = {
    "use_dora": "its magnitudes depend on the base weight; train it with peft.LoraConfig, which `rankfold fold` takes",
    "lora_bias": "a trained bias cannot be folded into a LoRA; leave it out",
    "layer_replication": "it duplicates layers of the base; use peft.LoraConfig",
    "loftq_config": "it changes the base weight; convert with PEFT's LoftQ first",
    "eva_config": "it belongs to init_lora_weights='eva', which is PEFT's alone",
    "corda_config": "it belongs to init_lora_weights='corda', which is PEFT's alone",
    "use_qalora": "its groups are those of a GPTQ base; use peft.LoraConfig",
    "alora_invocation_tokens": "activated LoRA is PEFT's; use peft.LoraConfig",
    "arrow_config": "routing between adapters is PEFT's; use peft.LoraConfig",
    "megatron_config": "Megatron layers are not adapted here",
}


class LoraFields(type):
    """Metaclass of the configs: looks at keyword arguments before the dataclass's own __init__ refuses them with a bare TypeError."""

    def __call__(cls, *args: Any, **given: Any) -> Any:
        return super().__call__(*args, **without_lora_fields(cls, given))


def without_lora_fields(config: type, given: dict[str, Any]) -> dict[str, Any]:
    """What a config is given or has, without the fields that only LoraConfig has; raises RankfoldError where one is set."""
    own = {f.name for f in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set()
    foreign = [name for name in given if name in _OF_LORA and name not in own]
    for name in foreign:
        value = given[name]
        if value and value != _default(_OF_LORA[name]):
            why = _WHY.get(name, "no method of rankfold has it; use peft.LoraConfig")
            raise RankfoldError(f"{config.__name__}: {name}={value!r} is not supported: {why}")
    return {name: value for name, value in given.items() if name not in foreign}


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
