"""LowRankTuner: PEFT's BaseTuner, once for all methods: injection, shared state, merging, saving and loading."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from peft.utils import (
    get_quantization_kwargs,
)
from torch import Tensor, nn

from rankfold.errors import RankfoldError
from rankfold.host import weighted
from rankfold.host.adapter import Adapter, SharedState, Site, forget
from rankfold.host.checkpoint import (
    LAYERS,
    PREFIX,
    SHARED,
    check_adapter_name,
    check_checkpoint,
    check_scheduled,
    check_states,
    check_whole,
    growing,
    grown,
    owned,
    plain_name,
    weights_before_merging,
)
from rankfold.host.config import LowRankConfig
from rankfold.host.fused_mlp import fuse_mlps, unfuse_mlps
from rankfold.host.kinds import EXPERTS, kind_named
from rankfold.host.layer import AdaptedLayer
from rankfold.host.linear_layer import AdaptedLinear
from rankfold.host.memory import check_fits
from rankfold.host.mixed_batches import passed_to_layers
from rankfold.host.parameter_layer import AdaptedParameters, ParameterAdapters
from rankfold.host.peft_api import (
    keep_out_of_base_state,
    onload_layer,
)
from rankfold.host.planning import PlanningTuner
from rankfold.host.siblings import link_siblings, part_siblings
from rankfold.host.tied import link_tied, warn_tied
from rankfold.host.tied_adapter import TiedAdapter
from rankfold.host.unreached import say

keep_out_of_base_state(SHARED)


class LowRankTuner(PlanningTuner):
    """Hosts every method. PEFT makes one per model; `registry` derives one class per method from it."""

    prefix = PREFIX
    tuner_layer_cls = AdaptedLayer

    # Injection ------------------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, state_dict=None, **kwargs: Any) -> None:
        check_adapter_name(adapter_name)
        # A copy: one config object may be given to several adapters, and each has a schedule of its own
        config: Any = copy.copy(self.peft_config[adapter_name])
        self.peft_config[adapter_name] = config
        asked = config.target_modules
        self._plan = self.plan(config, model, state_dict)
        if not any(p.is_meta for p in model.parameters()):
            check_fits(config, model, lambda: self._size(config))
        if state_dict is not None:
            self._check_given(config, adapter_name, model, state_dict)
        self.injected = getattr(self, "injected", set())  # adapters that were not loaded into or made active yet
        stale = getattr(unwrapped(model), SHARED, {})  # PEFT allows injecting a second time under one name
        if adapter_name in stale:
            forget(stale, adapter_name)
        planned = {*self._plan.sites, *self._plan.parameters}
        layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, AdaptedLayer)]
        for name, layer in layers:
            if adapter_name in layer.lowrank_adapters and not {plain_name(name), name} & planned:
                layer.delete_adapter(adapter_name)  # it would stay active, and be saved with the new one
        with warnings.catch_warnings():
            if (
                self._plan.parameters
            ):  # PEFT compares patterns with the names of modules alone, its own of fused experts too
                warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
            super().inject_adapter(model, adapter_name, *args, state_dict=state_dict, **kwargs)
        self.injected.add(adapter_name)
        for tied in link_tied([(n, m) for n, m in model.named_modules() if isinstance(m, AdaptedLayer)]):
            own = [name for name in tied if plain_name(name) not in self._plan.tied]
            if len(own) > 1:
                warn_tied(own)
        _warn_fast_path(model)
        say(model, asked)
        shared = getattr(unwrapped(model), SHARED, {})
        for state in shared[adapter_name].values() if adapter_name in shared else ():
            state.attached(unwrapped(model))
        link_siblings(model, AdaptedLinear)
        if config.fuse_mlp:
            fuse_mlps(model, AdaptedLinear)

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        """What PEFT warns of before a merge; adapters that are tied on purpose merge into the one weight once."""
        tied = all(getattr(config, "ensure_weight_tying", False) for config in self.peft_config.values())
        return [] if tied else super()._get_tied_target_modules(model)

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        for name, stacks in self._plan.parameters.items():
            parent_name, _, child = name.rpartition(".")
            if not child:
                raise RankfoldError(
                    f"target_parameters: {next(iter(stacks))} is of the model itself, which cannot be replaced"
                )
            layer: Any = model.get_submodule(name)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                adapters = ParameterAdapters(
                    {
                        p: nn.ModuleList(self._adapter(peft_config, adapter_name, site) for site in sites)
                        for p, sites in stacks.items()
                    }
                )
            if not isinstance(layer, AdaptedLayer):
                target, layer = layer, AdaptedParameters(layer, EXPERTS)
                layer._active_adapter = self.active_adapters
                self._replace_module(model.get_submodule(parent_name), child, layer, target)
            layer.shared_state = (getattr(unwrapped(self.model), SHARED, None),)
            layer.add_adapter(adapter_name, adapters, inference_mode=peft_config.inference_mode)
        return [f"{name}.{p}" for name, stacks in self._plan.parameters.items() for p in stacks]

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, AdaptedLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:  # unloaded; PEFT would hand on a weight, which not every module has
            setattr(parent, child_name, new_module)

    def _adapter(self, config: LowRankConfig, adapter_name: str, site: Site) -> Adapter:
        """A new adapter with its first values."""
        if site.name in self._plan.tied:  # PEFT comes to these last
            embedding: Any = self.model.get_input_embeddings()
            return TiedAdapter(config, site, embedding.adapters([adapter_name])[0])
        adapter = self.adapter_cls(config, site, self._shared_state(config, adapter_name, site))
        adapter.reset_parameters(config.init_lora_weights)
        return adapter

    def _check_given(self, config: LowRankConfig, name: str, model: nn.Module, given: dict[str, Tensor]) -> None:
        """Raises ValueError where the tensors that name the sites lack some of theirs: PEFT reads only which modules they name."""
        expected: dict[str, Tensor] = {}
        sizes: dict[str, int] = {}
        shared: dict[str, nn.Module | None] = {}
        with torch.device("meta"):
            for place, site in self._plan.places():
                group = self._plan.groups.get(site.name)
                if group is not None and group.key not in shared:
                    shared[group.key] = state = self.adapter_cls.make_shared(config, group)
                    tensors = {} if state is None else state.state_dict()
                    expected |= {f"{SHARED}.{self._plan.keys[group.key]}.{k}": v for k, v in tensors.items()}
                adapter = self.adapter_cls(config, site, None if group is None else shared[group.key])
                expected |= {f"{place}.{k}": v for k, v in adapter.state_dict().items()}
                sizes |= {f"{place}.{k}": dim for k, dim in adapter.growing.items()}
        found = {self._remove_adapter_name_from_key(plain_name(k), name): v for k, v in given.items()}
        check_checkpoint(config, expected, {plain_name(k) for k in model.state_dict()}, found, sizes)

    def _create_and_replace(
        self, peft_config: Any, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        site = self._plan.sites[plain_name(current_key)]
        adapter = self._adapter(peft_config, adapter_name, site)
        layer = target
        if not isinstance(layer, AdaptedLayer):
            quantised = get_quantization_kwargs(self.model)
            kind = kind_named(site.kind)
            layer = kind.layer(target, kind, quantised.get("get_apply_tensor_subclass"))
            layer._active_adapter = self.active_adapters
            self._replace_module(parent, target_name, layer, target)
        layer.shared_state = (getattr(unwrapped(self.model), SHARED, None),)
        layer.add_adapter(adapter_name, adapter, inference_mode=peft_config.inference_mode)

    def _size(self, config: LowRankConfig) -> int:
        """How many parameters an adapter has, buffers included."""
        groups = {g.key: self.adapter_cls.make_shared(config, g) for g in self._plan.groups.values()}
        made = list(groups.values())
        for site in self._plan.sites.values():
            group = self._plan.groups.get(site.name)
            made.append(self.adapter_cls(config, site, None if group is None else groups[group.key]))
        tensors = (t for one in made if one is not None for t in one.state_dict().values())
        return sum(t.numel() for t in tensors)

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
        shared = [by_group[adapter_name]] if adapter_name in by_group else []
        own = [a for m in self.model.modules() if isinstance(m, AdaptedLayer) for a in m.adapters([adapter_name])]
        for module in (*shared, *own) if autocast_adapter_dtype else ():
            for t in (*module.parameters(), *module.buffers()):  # PEFT casts parameters, and what lies in its layers
                if t.is_floating_point() and t.dtype.itemsize < 4:
                    t.data = t.data.float()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if not self.peft_config:
            part_siblings(self.model)
            unfuse_mlps(self.model)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat", **others: Any
    ) -> None:
        """Adds a frozen adapter whose update is Σ wᵢ ΔWᵢ of others, exactly; PEFT's interface, without its approximations.

        Args:
            combination_type: "cat", of the sum of their ranks; or "linear", of their rank, where all have one `down`.
            others: of PEFT's other combinations, such as svd_rank and density.

        Raises:
            RankfoldError: methods, heads and combinations that have no exact sum; names and weights that do not fit.
        """
        weighted.check(self.adapter_cls, self.peft_config, adapters, weights, adapter_name, combination_type, others)
        found = weighted.sums(self.model, adapters, weights, combination_type)
        self.peft_config[adapter_name] = weighted.config_of(self.peft_config[adapters[0]], found, self.model)  # pyright: ignore
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        weighted.fill(self.model, adapter_name, found)
        self.injected.discard(adapter_name)

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
        if (shared := getattr(unwrapped(self.model), SHARED, None)) is not None:
            for name in list(shared):
                forget(shared, name)
            delattr(unwrapped(self.model), SHARED)
        return model

    def _check_finite(self, adapter_names: list[str] | None) -> None:
        """Checks every layer before merging any, so that a safe merge is all or nothing (PEFT stops half way)."""
        for name, layer in self.model.named_modules():
            if isinstance(layer, AdaptedLayer):
                wanted = layer.active_adapters if adapter_names is None else adapter_names
                new = [n for n in wanted if n in layer.lowrank_adapters and n not in layer.merged_adapters]
                with onload_layer(layer):
                    if new and not layer.merges_to_finite(new):
                        raise RankfoldError(
                            f"NaNs detected in the merged weights. The adapter {', '.join(new)} seems to be broken, at {name}"
                        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Passes a call's `adapter_names`, one per row, to every layer (PEFT's interface for mixed batches)."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise RankfoldError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = {n for n in names if n != "__base__"} - set(self.peft_config)
        if unknown:
            raise RankfoldError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        with passed_to_layers(self.model, names, kwargs.get("num_beams") or 1):
            yield

    # Saving and loading ---------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(cls, model, config: Any, adapter_name, state_dict, unwanted_adapter_names):
        check_scheduled(model, config, adapter_name)
        own = owned(model, adapter_name)
        kept = {k: v for k, v in state_dict.items() if plain_name(k) in own}
        # PEFT has filtered out every key that contains another adapter's *name*; one called like a module takes ours along
        if unwanted_adapter_names:
            kept |= {k: v for k, v in model.state_dict().items() if plain_name(k) in own and k not in kept}
        kept = {plain_name(k): v for k, v in kept.items()}
        if not kept and dist.is_available() and dist.is_initialized() and dist.get_rank():
            return kept  # a state that was gathered on the first process alone
        check_whole(config, own, kept)
        # PEFT takes the tables of adapted embeddings from here too, and loads them under the adapter: an update merged into them would
        # count twice
        state_dict |= {k: v for k, v in weights_before_merging(model).items() if k in state_dict}
        config.grown = grown(model, adapter_name) or None
        return kept

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return re.sub(rf"(^|\.)({LAYERS}|{SHARED})\.{re.escape(adapter_name)}\.", r"\1\2.", key)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config: Any, adapter_name, state_dict):
        own = owned(model, adapter_name)
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
        loose = growing(model, adapter_name)
        sizes = {k: loose[name] for k, (key, _) in expected.items() if (name := plain_name(key)) in loose}
        try:
            check_checkpoint(config, {k: v for k, (_, v) in expected.items()}, others, state_dict, sizes)
            check_states(model, adapter_name, {plain_name(key): state_dict[k] for k, (key, _) in expected.items()})
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


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that `torch.compile(model)` wraps: the owner of shared state."""
    return getattr(model, "_orig_mod", model)


def _warn_fast_path(model: nn.Module) -> None:
    """torch's encoder layer reads the weights of its children in eval mode, past their forward and what is adapted there."""
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(m, AdaptedLayer) for m in module.modules()
        ):
            warnings.warn(
                f"{name or type(module).__name__} is a torch.nn.TransformerEncoderLayer, whose fast path ignores adapters in eval mode; "
                "call torch.backends.mha.set_fastpath_enabled(False)",
                stacklevel=2,
            )
            return
