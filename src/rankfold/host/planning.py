"""What an adapter will be on a model, decided before anything is touched: its sites, and what they share."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from rankfold.errors import RankfoldError, short
from rankfold.host.adapter import Adapter, Group, Site
from rankfold.host.checkpoint import LAYERS, PREFIX, SHARED, plain_name, short_keys, without_wrappers
from rankfold.host.config import LowRankConfig
from rankfold.host.kinds import kind_named, kind_of
from rankfold.host.layer import AdaptedLayer
from rankfold.host.names import absent_in_words, linear_layers_in_words
from rankfold.host.peft_api import (
    check_as_lora,
    include_all_linear_layers,
    name_fused_experts,
    tie_modules_to_save,
    tie_targets,
)
from rankfold.host.targets import absent_names, parameter_sites


@dataclass(frozen=True)
class Plan:
    """The plan for one config on one model, made before anything is touched.

    Args:
        tied: names of the heads that share the embedding's weight, and its adapter too.
        groups: by site name; absent where nothing is shared.
        parameters: of modules, by the model's own names, those that are adapted, each with its sites.
        keys: what each group is called in state dicts and files, by its own key.
    """

    sites: dict[str, Site]
    groups: dict[str, Group]
    keys: dict[str, str]
    parameters: dict[str, dict[str, list[Site]]]
    tied: set[str]

    def places(self) -> Iterator[tuple[str, Site]]:
        """Where in a state dict the tensors lie of each site that has some, without the adapter's name."""
        fused = {
            site.name: f"{plain_name(module)}.{LAYERS}.{parameter}.{i}"
            for module, stacks in self.parameters.items()
            for parameter, stack in stacks.items()
            for i, site in enumerate(stack)
        }
        for site in (site for name, site in self.sites.items() if name not in self.tied):
            yield fused.get(site.name, f"{site.name}.{LAYERS}"), site


class PlanningTuner(BaseTuner):
    """PEFT's tuner, as far as it decides what to adapt."""

    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    _add_targets_to_tie, _add_modules_to_save_to_tie = tie_targets, tie_modules_to_save
    #: The method's; `registry` sets it.
    adapter_cls: ClassVar[type[Adapter]]

    def plan(self, config: LowRankConfig, model: nn.Module, state_dict: dict[str, Tensor] | None = None) -> Plan:
        """Which modules get an adapter and what they share.

        Raises:
            TypeError: a target that is not linear.
            ValueError: sites that cannot share as the config asks.
        """
        config.check()  # a field may have been assigned since
        name_fused_experts(config, model)
        if config.ensure_weight_tying:
            self._check_tied_modules(model, config)
        config = self._prepare_adapter_config(config, self.get_model_config(model))  # pyright: ignore[reportAssignmentType]
        config = _all_linear(config, model)
        named = None if state_dict is None else {plain_name(k.rsplit("." + PREFIX, 1)[0]) for k in state_dict}
        sites: dict[str, Site] = {}
        parameters: dict[str, dict[str, list[Site]]] = {}
        tied: set[str] = set()
        inside: tuple[str, ...] = ()
        for name, module in model.named_modules():
            key = plain_name(name)
            if not name or (inside and name.startswith(inside)):
                continue
            if isinstance(module, BaseTunerLayer):
                inside = (*inside, name + ".")
            base: Any = module.get_base_layer() if isinstance(module, AdaptedLayer) else module
            if config.target_parameters and (found := parameter_sites(config, key, base)):
                parameters[name] = found
                sites |= {site.name: site for stack in found.values() for site in stack}
            if self._check_tied_module_exists(config, key):
                tied.add(key)
                sites[key] = site_of(key, module)
                continue
            if not (key in named if named is not None else self._check_target_module_exists(config, key)):
                continue
            sites[key] = site_of(key, module)
        for site in sites.values():
            self._check_served(config, site)
        adapter_cls = self.adapter_cls
        members: dict[str, list[Site]] = {}
        for site in sites.values():
            if site.name in tied:
                continue
            adapter_cls.check_site(config, site)
            group_key = adapter_cls.group_key(config, site)
            if group_key is not None:
                members.setdefault(group_key, []).append(site)
        groups = {key: Group(key, tuple(group)) for key, group in members.items()}
        for group in groups.values():
            adapter_cls.check_group(config, group)
        if groups:
            _check_name_of_shared(config, model)
        by_site = {site.name: group for group in groups.values() for site in group.sites}
        if state_dict is None:
            (_warn_absent if sites else _check_found)(config, model)
        return Plan(sites, by_site, short_keys(list(groups)), parameters, tied)

    def _check_served(self, config: LowRankConfig, site: Site) -> None:
        """Raises RankfoldError where the method does not adapt modules of this kind."""
        if (self.adapter_cls.linear_only or not config.fixed) and not kind_named(site.kind).linear:
            raise RankfoldError(
                f"{type(config).__name__}: {site.name} is of the kind {site.kind!r}, and {config.method} adapts linear "
                "layers alone; leave it out of target_modules, or choose another method"
            )

    @staticmethod
    def _check_target_module_exists(peft_config, key: str) -> bool | re.Match[str] | None:
        if key.startswith(SHARED):
            return None
        return BaseTuner._check_target_module_exists(peft_config, key)

    def _prepare_adapter_config(self, peft_config: LowRankConfig, model_config: dict) -> LowRankConfig:  # pyright: ignore[reportIncompatibleMethodOverride]
        if peft_config.target_modules is None:
            peft_config.target_modules = peft_config.default_targets()  # pyright: ignore[reportAttributeAccessIssue]
        if peft_config.target_modules is None and peft_config.target_parameters:
            known = self.target_module_mapping.get(model_config.get("model_type", ""))
            peft_config.target_modules = set(known or ())  # pyright: ignore[reportAttributeAccessIssue]
            return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)  # pyright: ignore[reportReturnType]

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        check_as_lora(peft_config, model, target_name)


def _all_linear(config: Any, model: nn.Module) -> Any:
    """Puts names in the place of "all-linear", as PEFT does, without the routers that are linear layers by their class alone."""
    everything = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    model = without_wrappers(model)  # PEFT does not know the head of a compiled model
    config = include_all_linear_layers(config, model)
    if everything:
        linear = {name: model.get_submodule(name) for name in config.target_modules}
        routers = {name for name, module in linear.items() if isinstance(module, nn.Linear) and kind_of(module) is None}
        config.target_modules = {plain_name(name) for name in linear.keys() - routers}
    return config


def site_of(name: str, module: Any) -> Site:
    """Where an adapter of this module would sit.

    Raises:
        TypeError: nothing here adapts such a module, or it changes its own weight.
    """
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    kind = kind_of(base)
    if isinstance(module, BaseTunerLayer) and not isinstance(module, AdaptedLayer):
        raise TypeError(
            f"target_modules: {name} carries an adapter of PEFT's already ({type(module).__module__}.{type(module).__name__}); "
            "merge it first: model = model.merge_and_unload()"
        )
    if kind is None:
        raise TypeError(
            f"target_modules: {name} is a {type(module).__name__}, and only linear layers (torch.nn.Linear, transformers' Conv1D, "
            "quantised linears), convolutions and embeddings can be adapted; leave it out of target_modules"
        )
    if getattr(base, "max_norm", None) is not None:
        raise TypeError(
            f"target_modules: {name} has max_norm={base.max_norm}, so it shortens rows of its table in the forward, and a merged "
            "update with them; leave it out of target_modules"
        )
    return Site(name, *kind.features(base), kind.name, tuple(getattr(base, "kernel_size", ())))


def _warn_absent(config: LowRankConfig, model: nn.Module) -> None:
    """Names that match nothing while others do. Patterns are PEFT's to warn of, and heads are named by it on suspicion."""
    for field, absent in absent_names(config, model):
        if field in ("target_modules", "exclude_modules", "target_parameters"):
            warnings.warn(f"{field}: {absent!r} has no effect: {absent_in_words(field, absent, model)}", stacklevel=2)


def _check_found(config: LowRankConfig, model: nn.Module) -> None:
    """Raises RankfoldError for target_modules of which nothing is in the model; what it has in their place, PEFT does not say."""
    asked = config.target_modules
    absent = [name for field, name in absent_names(config, model) if field == "target_modules"]
    if isinstance(asked, str) or (absent and len(absent) == len(asked or ())):
        said = (
            linear_layers_in_words(model)
            if isinstance(asked, str)
            else absent_in_words("target_modules", absent[0], model)
        )
        raise RankfoldError(
            f"{type(config).__name__}: target_modules={short(asked)} not found in the base model: {said}"
        )


def _check_name_of_shared(config: LowRankConfig, model: Any) -> None:
    """Raises RankfoldError for a module that PEFT, which matches the end of a name, would take the shared state for: T5's "shared"."""
    tokens, names = config.trainable_token_indices, list(config.modules_to_save or ())
    if isinstance(tokens, dict):
        names += tokens
    elif tokens is not None:
        embeddings = model.get_input_embeddings()
        names += [name for name, module in model.named_modules() if module is embeddings]
    if taken := next((name for name in names if SHARED.endswith(name)), None):
        field = "modules_to_save" if taken in (config.modules_to_save or ()) else "trainable_token_indices"
        raise RankfoldError(
            f"{type(config).__name__}: {field} is about {taken!r}, with which {SHARED!r} ends, the state that this method's layers share, "
            "and PEFT would take it for that module; leave it out, or choose a method without shared state"
        )
