"""What PEFT itself makes of an adapter's config: it is read, and a LoRA's is put on one small linear layer."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftConfig, inject_adapter_in_model
from torch import nn

from rankfold.text import one_line

#: Fields about modules, layers and tokens of the base, of which the small one has none, and about code that a user may lack.
_OF_THE_BASE = (
    "target_modules", "exclude_modules", "target_parameters", "modules_to_save", "layers_to_transform", "layers_pattern",
    "layer_replication", "rank_pattern", "alpha_pattern", "trainable_token_indices", "use_bdlora", "megatron_config",
)  # fmt: skip
_LARGEST = 64


def refusal(config: dict[str, Any]) -> str:
    """What PEFT says where it stops at a config; "" where it does not, or does not know the type.

    Args:
        config: what adapter_config.json holds.
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        return ""
    config = {key: value for key, value in config.items() if key != "runtime_config"}  # PEFT warns and drops it
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            if type(PeftConfig.from_peft_type(**config)) is LoraConfig:
                inject_adapter_in_model(
                    _small(config), nn.Sequential(nn.Linear(_LARGEST, _LARGEST, device="cpu", dtype=torch.float32))
                )
        except Exception as error:  # PEFT raises anything on a value
            return one_line(error)
    return ""


def _small(config: dict[str, Any]) -> PeftConfig:
    r, start = config.get("r", 8), str(config.get("init_lora_weights"))
    kept = {key: value for key, value in config.items() if key not in _OF_THE_BASE}
    if isinstance(r, int) and r > _LARGEST:
        kept["r"] = _LARGEST + r % 2  # some starts want an even one
    if start.startswith(("pissa_niter", "loftq")):  # may take long, or a package
        kept["init_lora_weights"] = True
    return PeftConfig.from_peft_type(**kept, target_modules=["0"])
