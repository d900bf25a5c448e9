"""LowRankTuner: PEFT's BaseTuner, once for all methods: planning, injection, shared state, saving and loading."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    get_quantization_kwargs,
)
from torch import Tensor, nn

from rankfold.errors import RankfoldError
from rankfold.host.adapter import Adapter, Group, SharedState, Site
from rankfold.host.config import LowRankConfig
from rankfold.host.fused_mlp import fuse_mlps, unfuse_mlps
from rankfold.host.kinds import KINDS, kind_of
from rankfold.host.layer import AdaptedLayer
from rankfold.host.linear_layer import AdaptedLinear
from rankfold.host.peft_api import check_as_lora, include_all_linear_layers, onload_layer
from rankfold.host.siblings import link_siblings, part_siblings
from rankfold.host.targets import absent_names
from rankfold.host.tied import link_tied, warn_tied

PREFIX = "lowrank_"
SHARED = "lowrank_shared"  # ModuleDict on the adapted model: adapter name → group key → state
LAYERS = "lowrank_adapters"  # ModuleDict on each AdaptedLayer: adapter name → Adapter


@dataclass(frozen=True)
class Plan:
    """What one config asks for on one model, before anything is touched.

    Args:
        groups: by site name; absent where nothing is shared.
        keys: what each group is called in state dicts and files, by its own key.
    """

    sites: dict[str, Site]
    groups: dict[str, Group]
    keys: dict[str, str]


class LowRankTuner(BaseTuner):
    """Hosts every method. PEFT makes one per model; `registry` derives one class per method from it."""

    prefix = PREFIX
    tuner_layer_cls = AdaptedLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    #: The method's; `registry` sets it.
    adapter_cls: ClassVar[type[Adapter]]

    # Planning -------------------------------------------------------------------------------------------------------

    def plan(self, config: LowRankConfig, model: nn.Module, state_dict: dict[str, Tensor] | None = None) -> Plan:
        """Which modules get an adapter and what they share.

        Raises:
            TypeError: a target that is not linear.
            ValueError: sites that cannot share as the config asks.
        """
        config.check()  # a field may have been assigned since
        config = self._prepare_adapter_config(config, self.get_model_config(model))  # pyright: ignore[reportAssignmentType]
        if state_dict is None:
            for field, absent in absent_names(config, [plain_name(name) for name, _ in model.named_modules()]):
                if field != "modules_to_save":  # PEFT adds the names that heads usually have
                    warnings.warn(
                        f"{field}: no module of the model is called {absent!r}; it has no effect", stacklevel=2
                    )
        config = include_all_linear_layers(config, model)  # pyright: ignore[reportAssignmentType]
        named = None if state_dict is None else {plain_name(k.rsplit("." + PREFIX, 1)[0]) for k in state_dict}
        sites: dict[str, Site] = {}
        inside: tuple[str, ...] = ()
        for name, module in model.named_modules():
            key = plain_name(name)
            if not name or (inside and name.startswith(inside)):
                continue
            if isinstance(module, BaseTunerLayer):
                inside = (*inside, name + ".")
            if not (key in named if named is not None else self._check_target_module_exists(config, key)):
                continue
            sites[key] = site_of(key, module)
        adapter_cls = self.adapter_cls
        members: dict[str, list[Site]] = {}
        for site in sites.values():
            group_key = adapter_cls.group_key(config, site)
            if group_key is not None:
                members.setdefault(group_key, []).append(site)
        groups = {key: Group(key, tuple(group)) for key, group in members.items()}
        for group in groups.values():
            adapter_cls.check_group(config, group)
        by_site = {site.name: group for group in groups.values() for site in group.sites}
        return Plan(sites, by_site, short_keys(list(groups)))

    @staticmethod
    def _check_target_module_exists(peft_config, key: str) -> bool | re.Match[str] | None:
        if key.startswith(SHARED):
            return None
        return BaseTuner._check_target_module_exists(peft_config, key)

    def _prepare_adapter_config(self, peft_config: LowRankConfig, model_config: dict) -> LowRankConfig:  # pyright: ignore[reportIncompatibleMethodOverride]
        if peft_config.target_modules is None:
            peft_config.target_modules = peft_config.default_targets()  # pyright: ignore[reportAttributeAccessIssue]
        return super()._prepare_adapter_config(peft_config, model_config)  # pyright: ignore[reportReturnType]

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        check_as_lora(peft_config, model, target_name)

    # Injection ------------------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, state_dict=None, **kwargs: Any) -> None:
        config: Any = self.peft_config[adapter_name]
        self._plan = self.plan(config, model, state_dict)
        self.injected = getattr(self, "injected", set())  # adapters that were not loaded into or made active yet
        stale = getattr(unwrapped(model), SHARED, {})  # PEFT allows injecting a second time under one name
        if adapter_name in stale:
            del stale[adapter_name]
        super().inject_adapter(model, adapter_name, *args, state_dict=state_dict, **kwargs)
        self.injected.add(adapter_name)
        for tied in link_tied([(n, m) for n, m in model.named_modules() if isinstance(m, AdaptedLayer)]):
            warn_tied(tied)
        link_siblings(model, AdaptedLinear)
        if config.fuse_mlp:
            fuse_mlps(model, AdaptedLinear)

    def _create_and_replace(
        self, peft_config: Any, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        site = self._plan.sites[plain_name(current_key)]
        adapter = self.adapter_cls(peft_config, site, self._shared_state(peft_config, adapter_name, site))
        adapter.reset_parameters(peft_config.init_lora_weights)
        layer = target
        if not isinstance(layer, AdaptedLayer):
            quantised = get_quantization_kwargs(self.model)
            kind = next(kind for kind in KINDS if kind.name == site.kind)
            layer = kind.layer(target, kind, quantised.get("get_apply_tensor_subclass"))
            layer._active_adapter = self.active_adapters
            self._replace_module(parent, target_name, layer, target)
        layer.shared_state = (getattr(unwrapped(self.model), SHARED, None),)
        layer.add_adapter(adapter_name, adapter, inference_mode=peft_config.inference_mode)

    def _shared_state(self, config: LowRankConfig, adapter_name: str, site: Site) -> nn.Module | None:
        """The state of the site's group, made at the first site that asks for it."""
        group = self._plan.groups.get(site.name)
        if group is None:
            return None
        owner = unwrapped(self.model)
        if not hasattr(owner, SHARED):
            # On the model and not on the tuner, so that it outlives the tuner where PEFT injects without a PeftModel
            owner.add_module(SHARED, SharedState())
        by_group = getattr(owner, SHARED)
        if adapter_name not in by_group:
            by_group[adapter_name] = nn.ModuleDict()
        key = self._plan.keys[group.key]
        if key not in by_group[adapter_name]:
            shared = self.adapter_cls.make_shared(config, group)
            if shared is None:
                return None
            vars(shared)["tensor_names"] = tuple(shared.state_dict())
            by_group[adapter_name][key] = shared
        return by_group[adapter_name][key]

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        shared = list(getattr(unwrapped(model), SHARED, nn.Module()).parameters())
        wanted = [p.requires_grad for p in shared]  # as set_adapter left them; PEFT knows only what lies in its layers
        super()._mark_only_adapters_as_trainable(model)
        for p, flag in zip(shared, wanted, strict=True):
            p.requires_grad_(flag)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        by_group = getattr(unwrapped(self.model), SHARED, {})
        if autocast_adapter_dtype and adapter_name in by_group:
            for t in [*by_group[adapter_name].parameters(), *by_group[adapter_name].buffers()]:
                if t.is_floating_point() and t.dtype.itemsize < 4:
                    t.data = t.data.float()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if not self.peft_config:
            part_siblings(self.model)
            unfuse_mlps(self.model)

    # Merging --------------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        if safe_merge:
            self._check_finite(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False, adapter_names=None
    ):
        if merge and safe_merge:
            self._check_finite(adapter_names)
        part_siblings(self.model)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        unfuse_mlps(self.model)
        if hasattr(unwrapped(self.model), SHARED):
            delattr(unwrapped(self.model), SHARED)
        return model

    def _check_finite(self, adapter_names: list[str] | None) -> None:
        """Looks at every layer before any is merged, so that a safe merge is all or nothing (PEFT stops half way)."""
        for name, layer in self.model.named_modules():
            if isinstance(layer, AdaptedLayer):
                wanted = layer.active_adapters if adapter_names is None else adapter_names
                new = [n for n in wanted if n in layer.lowrank_adapters and n not in layer.merged_adapters]
                with onload_layer(layer):
                    if new and not torch.isfinite(layer.merged_weight(new)).all():
                        raise RankfoldError(
                            f"NaNs detected in the merged weights at {name}. The adapters {new} seem to be broken"
                        )

    # Mixed batches ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """`adapter_names` of a call, one per row, reaches every layer (PEFT's interface for mixed batches)."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise RankfoldError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = {n for n in names if n != "__base__"} - set(self.peft_config)
        if unknown:
            raise RankfoldError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        # Beam search repeats every row, but only after an encoder has read it
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else self.model
        once = set() if encoder is self.model else set(encoder.modules())
        repeated = [n for n in names for _ in range(kwargs.get("num_beams") or 1)]

        def pass_names(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return args, {**kwargs, "adapter_names": names if module in once else repeated}

        hooks = [
            m.register_forward_pre_hook(pass_names, with_kwargs=True)
            for m in self.model.modules()
            if isinstance(m, (AdaptedLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    # Saving and loading ---------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(cls, model, config: Any, adapter_name, state_dict, unwanted_adapter_names):
        _check_scheduled(model, config, adapter_name)
        own = _owned(model, adapter_name)
        kept = {k: v for k, v in state_dict.items() if plain_name(k) in own}
        # PEFT has filtered out every key that contains another adapter's *name*; one called like a module takes ours along
        if len(kept) < len(own):
            kept |= {k: v for k, v in model.state_dict().items() if plain_name(k) in own and k not in kept}
        kept = {plain_name(k): v for k, v in kept.items()}
        _check_whole(config, own, kept)
        return kept

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return re.sub(rf"(^|\.)({LAYERS}|{SHARED})\.{re.escape(adapter_name)}\.", r"\1\2.", key)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config: Any, adapter_name, state_dict):
        own = _owned(model, adapter_name)
        expected = {
            cls._remove_adapter_name_from_key(plain_name(k), adapter_name): (k, v)
            for k, v in model.state_dict().items()
            if plain_name(k) in own
        }
        if not any(k.startswith("base_model.model.") for k in expected):
            # injected without a PeftModel: the model's keys lack the prefix that files have
            expected = {"base_model.model." + k: v for k, v in expected.items()}
            state_dict = {
                k if k.startswith("base_model.model.") else "base_model.model." + k: v for k, v in state_dict.items()
            }
        others = {"base_model.model." + k.removeprefix("base_model.model.") for k in model.state_dict()}
        try:
            _check_checkpoint(config, {k: v for k, (_, v) in expected.items()}, others, state_dict)
        except RankfoldError:
            tuner = getattr(model, "base_model", None)
            if isinstance(tuner, LowRankTuner) and adapter_name in tuner.injected and len(tuner.peft_config) > 1:
                tuner.delete_adapter(adapter_name)  # it was injected for this file, and has random values
            raise
        for module in model.modules():
            if isinstance(module, AdaptedLayer):
                for adapter in module.adapters([adapter_name]):
                    adapter.has_history = True
        if isinstance(tuner := getattr(model, "base_model", None), LowRankTuner):
            tuner.injected.discard(adapter_name)
        return {expected[k][0] if k in expected else k: v for k, v in state_dict.items()}


WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """A module's name or a key without what torch.compile, FSDP and activation checkpointing put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that `torch.compile(model)` wraps: the owner of shared state."""
    return getattr(model, "_orig_mod", model)


def short_keys(keys: list[str]) -> dict[str, str]:
    """Names of groups for state dicts and files: without the path that all have in common, which a model of another class, a
    prefix or a renaming changes, and with letters that every file system takes.

    >>> short_keys(["model.layers.*.self_attn.q_proj:8x8", "model.layers.*.self_attn.v_proj:8x4"])
    {'model.layers.*.self_attn.q_proj:8x8': 'q_proj-8x8', 'model.layers.*.self_attn.v_proj:8x4': 'v_proj-8x4'}
    """
    parts = [key.split(".") for key in keys]
    common = 0
    while parts and all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    names = [re.sub(r"[^\w-]+", "-", ".".join(p[common:])).strip("-") for p in parts]
    return {
        key: name if names.count(name) == 1 else f"{name}-{i}"
        for i, (key, name) in enumerate(zip(keys, names, strict=True))
    }


def site_of(name: str, module: Any) -> Site:
    """Where an adapter of this module would sit.

    Raises:
        TypeError: nothing here adapts such a module.
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
            f"target_modules: {name} is a {type(module).__name__}, and only linear layers (torch.nn.Linear, "
            "transformers' Conv1D, quantised linears) can be adapted; leave it out of target_modules"
        )
    return Site(name, *kind.features(base), kind.name)


def _owned(model: nn.Module, adapter_name: str) -> set[str]:
    """The state-dict keys that belong to one adapter, wrappers' names left out; read off the modules, not off their names."""
    own: set[str] = set()
    for name, module in model.named_modules():
        dot = f"{plain_name(name)}." if plain_name(name) else ""
        if isinstance(module, AdaptedLayer):
            for adapter in module.adapters([adapter_name]):
                own |= {f"{dot}{LAYERS}.{adapter_name}.{key}" for key in adapter.tensor_names}
        shared = module._modules.get(SHARED)
        if isinstance(shared, nn.ModuleDict) and adapter_name in shared:
            for group, state in shared[adapter_name].items():  # pyright: ignore[reportCallIssue]
                own |= {f"{dot}{SHARED}.{adapter_name}.{group}.{key}" for key in state.tensor_names}
    return own


def _check_whole(config: LowRankConfig, own: set[str], found: dict[str, Tensor]) -> None:
    """Raises RankfoldError where an adapter would be saved without some of its tensors, or with shards of them."""
    missing = own - found.keys()
    empty = sorted(k for k, v in found.items() if v.ndim == 1 and v.numel() == 0)
    if missing:
        raise RankfoldError(
            f"This {config.method} adapter would be saved without {len(missing)} of its {len(own)} tensors (such as "
            f"{min(missing)}): the state dict that was handed over lacks them. Gather the whole model first (FSDP: "
            "full_state_dict; DeepSpeed ZeRO-3: zero.GatheredParameters), then save"
        )
    if empty:
        raise RankfoldError(
            f"This {config.method} adapter would be saved with {len(empty)} empty tensors (such as {empty[0]}): their values "
            "lie on other processes or are offloaded. Gather the parameters first, then save"
        )


def _check_scheduled(model: nn.Module, config: LowRankConfig, adapter_name: str) -> None:
    """Raises RuntimeError for a scheduled adapter that was trained without its controller."""
    if config.allow_unscheduled:
        return
    for module in model.modules():
        if isinstance(module, AdaptedLayer):
            for adapter in module.adapters([adapter_name]):
                if adapter.trained_unscheduled():
                    raise RuntimeError(
                        f"This {config.method} adapter was trained without its controller: its ranks never changed, and "
                        "what would be saved is not the method. Call rankfold.attach(model, optimizer, total_steps=...) "
                        "before the loop or give Trainer callbacks=[rankfold.AdapterCallback()]; to save it all the "
                        "same, set allow_unscheduled=True in its config."
                    )


def _check_checkpoint(
    config: LowRankConfig, expected: dict[str, Tensor], others: set[str], found: dict[str, Tensor]
) -> None:
    """Raises ValueError for a checkpoint that lacks tensors, has foreign ones, other shapes, or NaN or infinity.

    Args:
        expected: the adapter's tensors as it is now, by their key in a file.
        others: keys of the model's other tensors, which may be in a file too (a head, resized embeddings).
        found: the file's.
    """
    what = f"this {config.method} adapter"
    ours = {k: v for k, v in found.items() if k in expected or k not in others}
    missing, foreign = expected.keys() - ours.keys(), ours.keys() - expected.keys()
    if missing or foreign:
        lacks = f"lacks {len(missing)} of {len(expected)} tensors (such as {min(missing)})" if missing else ""
        has = f"has {len(foreign)} that do not belong (such as {min(foreign)})" if foreign else ""
        raise RankfoldError(
            f"The checkpoint of {what} {' and '.join(filter(None, [lacks, has]))}: it is incomplete, or was trained on "
            "another base model or with another config. Check base_model_name_or_path and target_modules."
        )
    for key, tensor in ours.items():
        if tensor.shape != expected[key].shape:
            raise RankfoldError(
                f"The checkpoint of {what} has {key} of shape {tuple(tensor.shape)}, but this model and config need "
                f"{tuple(expected[key].shape)}: another base model, rank or set of target_modules."
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise RankfoldError(
                f"The checkpoint of {what} has NaN or infinity in {key}: it was saved from a diverged run."
            )
