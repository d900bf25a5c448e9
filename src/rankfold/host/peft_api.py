"""Keeps everything undocumented about PEFT in one file: private names, and new members of its `PeftType` enum.

No other file of the package imports a private name of PEFT (tests/test_imports.py). Where a name is missing, importing rankfold
says so in one sentence. PEFT's public `register_peft_method` refuses names that the enum lacks, and third parties have no entry
point, so a member is added. The versions it is tested with stand in `rankfold.peft_version`, which importing rankfold checks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from peft.utils import PeftType
from torch import nn

from rankfold.errors import RankfoldError
from rankfold.peft_version import TESTED

try:
    from peft import LoraConfig, LoraModel
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.optimizers.lorafa import LoraFAOptimizer
    from peft.tuners.tuners_utils import (
        _check_lora_target_modules_mamba,
        _get_in_out_features,
        _maybe_include_all_linear_layers,
        check_adapters_to_merge,
        onload_layer,
    )
    from peft.utils import save_and_load
    from peft.utils.other import get_pattern_key
    from peft.utils.transformers_weight_conversion import (
        _MODEL_TO_CONVERSION_PATTERN,  # pyright: ignore[reportPrivateImportUsage]
        _MOE_TARGET_MODULE_MAPPING,
        _convert_peft_config_moe,
        convert_peft_adapter_state_dict_for_transformers,
    )

    _ = save_and_load._get_adapter_state_dict_key_prefixes
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"rankfold needs a name that PEFT {version('peft')} does not have ({error}); "
        f"install peft>={TESTED[0]},<{TESTED[1]}, the range it is tested with"
    ) from error

#: How PEFT's LoRA prepares a config whose adapters or saved modules are to stay tied.
tie_targets, tie_modules_to_save = LoraModel._add_targets_to_tie, LoraModel._add_modules_to_save_to_tie
in_out_features = _get_in_out_features
include_all_linear_layers = _maybe_include_all_linear_layers

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "LoraFAOptimizer",
    "add_peft_type",
    "check_adapters_to_merge",
    "check_as_lora",
    "exact_pattern",
    "get_pattern_key",
    "in_out_features",
    "include_all_linear_layers",
    "keep_out_of_base_state",
    "name_fused_experts",
    "names_of_experts",
    "onload_layer",
    "patterns_of_moved",
    "peft_name",
    "renamed_on_loading",
    "tie_modules_to_save",
    "tie_targets",
]


def exact_pattern(name: str) -> str:
    r"""The key of rank_pattern or alpha_pattern that matches this module and no other.

    PEFT takes a key as a regular expression for the end of a module's name; `^` keeps one that is another's ending apart.

    >>> exact_pattern("h.1.attn")
    '^h\\.1\\.attn'
    """
    return "^" + re.escape(name)


def patterns_of_moved(moved: dict[str, str], patterns: dict[str, Any], default: Any) -> dict[str, Any]:
    """A rank_pattern or alpha_pattern for modules that have other names now: what it gave each under its old name comes first, since
    the pattern may match no new name, or another's.

    Args:
        moved: old name → new name.
        default: the value of a module that no pattern matches.
    """
    keys = list(patterns)
    return {
        exact_pattern(new): patterns.get(get_pattern_key(keys, old), default) for old, new in moved.items()
    } | patterns


def renamed_on_loading(keys: Iterable[str], model: nn.Module) -> set[str]:
    """What PEFT makes of the keys of a LoRA's file when it loads it: of some models it knows what their modules were called before
    transformers 5.

    Args:
        model: the base, perhaps on the meta device.
    """
    empty = {key: torch.empty(1, 1, device="meta") for key in keys}
    return set(convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), empty))


def check_as_lora(config: Any, model: Any, target_name: str) -> None:
    """Raises ValueError for a module that PEFT refuses to adapt with its own LoRA types, which it lists by name: fused kernels
    (Mamba's) read its weight past its forward."""
    as_lora: Any = SimpleNamespace(peft_type="LORA")
    try:
        _check_lora_target_modules_mamba(as_lora, model, target_name)
    except ValueError as error:
        raise RankfoldError(
            f"{type(config).__name__}: target_modules: {target_name} of a {model.config.model_type} model cannot be adapted, because "
            "its fused kernels read the weight past the module; leave it out of target_modules"
        ) from error


def names_of_experts(model: Any) -> dict[str, str]:
    """What the experts' and routers' modules of such a model were called before transformers fused them → the parameter that PEFT
    makes of the name; empty for other models."""
    kind: Any = getattr(getattr(model, "config", None), "model_type", None)
    return _MOE_TARGET_MODULE_MAPPING.get(_MODEL_TO_CONVERSION_PATTERN.get(kind, ""), {})


def name_fused_experts(config: Any, model: Any) -> None:
    """Puts parameters into a config's `target_parameters` for those names in its `target_modules`, as PEFT does for its LoRA. What
    "all-linear" means leaves routers alone.

    Raises:
        RankfoldError: one of two names that became one parameter.
    """
    if not names_of_experts(model) or not config.target_modules:
        return
    everything = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    try:
        _convert_peft_config_moe(config, model)
    except ValueError as error:
        raise RankfoldError(f"{type(config).__name__}: target_modules: {error}") from error
    routers = {name for name in config.target_parameters if name.endswith(".weight")} if everything else set()
    config.target_parameters = sorted(set(config.target_parameters) - routers) or None


def keep_out_of_base_state(name: str) -> None:
    """Tells PEFT that what a base model has under `name` is an adapter's, so that `get_base_model_state_dict` and
    `set_base_model_state_dict` leave it alone; PEFT looks for such state only inside tuner layers."""
    theirs = save_and_load._get_adapter_state_dict_key_prefixes
    save_and_load._get_adapter_state_dict_key_prefixes = lambda model: theirs(model) | {name}


def peft_name(method: str) -> str:
    """The name PEFT knows a method by; prefixed, so that PEFT may add a method of the same name."""
    return f"rankfold_{method}"


def add_peft_type(name: str) -> PeftType:
    """The `PeftType` member called `name` in upper case, added if it is not there yet."""
    key = name.upper()
    if key in PeftType.__members__:
        return PeftType[key]
    member = str.__new__(PeftType, key)
    member._name_, member._value_ = key, key
    member.__objclass__ = PeftType  # pyright: ignore[reportAttributeAccessIssue]
    member._sort_order_ = len(PeftType._member_names_)  # pyright: ignore[reportAttributeAccessIssue]
    PeftType._member_names_.append(key)
    PeftType._member_map_[key] = PeftType._value2member_map_[key] = member
    type.__setattr__(PeftType, key, member)
    return member


# for fold and inspect: what reading PEFT's own adapters needs. The members are called on PEFT's classes and layers
try:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    _MEMBERS = (BaseTunerLayer._get_available_adapters, BaseTuner._remap_adapter_state_dict_for_load)
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"rankfold needs a name that PEFT {version('peft')} does not have ({error}); "
        f"install peft>={TESTED[0]},<{TESTED[1]}, the range it is tested with"
    ) from error

__all__ += ["BaseTuner", "BaseTunerLayer", "LoraLayer", "ParamWrapper"]
