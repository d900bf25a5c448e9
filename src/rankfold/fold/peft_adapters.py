"""One of PEFT's own adapters as the source of a fold: a live model, or a folder put on a base without weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import (
    PEFT_TYPE_TO_TUNER_MAPPING,
    PeftConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankfold.errors import RankfoldError
from rankfold.fold.peft_refusals import UNKNOWN_STARTS, check_foldable, check_kind
from rankfold.fold.peft_updates import STARTS, kind, update_of
from rankfold.fold.plain_lora import from_tensors, is_plain, modules_of
from rankfold.fold.sites import modules_of_experts, of_adapted_types, siblings
from rankfold.fold.source import (
    Source,
    Update,
    base_skeleton,
    fitting,
    folding_device,
    live_base,
    never_adapted,
    output_head,
    saved_live,
    vocabulary_of,
)
from rankfold.host.adapter import Site
from rankfold.host.checkpoint import plain_modules, plain_name
from rankfold.host.kinds import kind_named, kind_of
from rankfold.host.peft_api import BaseTunerLayer, ParamWrapper, in_out_features, patterns_of_moved
from rankfold.host.targets import sites_of_parameter
from rankfold.io.adapter_names import PREFIX, is_saved, mended, without_copies, wrapped
from rankfold.io.adapters import classes_in, read_classes
from rankfold.io.formats import SavedAdapter
from rankfold.io.weight_names import to_model
from rankfold.io.weights import weight_reader


def from_model(model: nn.Module, adapter_name: str = "default") -> Source:
    """Reads a live model, PeftModel or injected.

    Raises:
        ValueError: no adapter of that name, one that is merged, or one that has no fold.
    """
    configs: dict[str, PeftConfig] = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if config is None:
        raise RankfoldError(f"adapter_name={adapter_name!r}: the model has {sorted(configs)}")
    check_foldable(config)
    others = [n for n, c in configs.items() if n != adapter_name and _start(c).startswith((*STARTS, *UNKNOWN_STARTS))]
    if others:
        raise RankfoldError(
            f"adapter {others[0]!r} took its start out of this model's base, so {adapter_name!r} is not relative to the base "
            "itself; save it and fold its folder"
        )
    base: Any = live_base(model)
    places = places_of(base, adapter_name, config)
    modules = {place.module: place.layer for place in places.values()}
    if merged := next((name for name, layer in modules.items() if layer.merged), None):
        raise RankfoldError(f"{merged}: adapter {adapter_name!r} is merged; call unmerge_adapter() first")

    def live(name: str) -> Tensor:
        weight: Tensor = modules[name].get_base_layer().weight
        if not weight.is_floating_point():
            raise RankfoldError(
                f"{name}: this adapter's update depends on the base's weights, which are quantised here; "
                "save the adapter and fold its folder with --base of the unquantised model"
            )
        return weight.detach().to(folding_device(weight))

    read = live
    if _start(config) in STARTS:  # the live weights are no longer the base's
        read = weight_reader(config.base_model_name_or_path, config.revision, base)
    heads = {}
    if _kept(config):
        saved = saved_live(model, adapter_name)
        config = _tied_too(config, saved, base)
        heads = {key: tensor for key, tensor in saved.items() if is_saved(key, _kept(config))}
    return _source(base, config, adapter_name, places, read, heads)


def from_files(adapter: SavedAdapter, base: str | None = None) -> Source:
    """Reads an adapter on its base, of which config.json is needed, and single weights by some types.

    Raises:
        ValueError: tensors that are truncated, foreign, missing, not finite, of another base; a type that has no fold.
    """
    folder, config = adapter.folder, adapter.config
    check_foldable(config)
    tensors, notes = _tensors(adapter)
    plain = is_plain(config)
    modules = modules_of(tensors)
    try:
        skeleton = base_skeleton(config, base, lambda model: _has_all(model, modules))
    except RankfoldError as error:
        if (
            not plain or base or getattr(config, "target_parameters", None)
        ):  # a file does not say which parameter is whose
            raise
        why = f"the base was not looked at ({error}), so absent modules are not written as zeros, as SGLang and TGI want them"
        return _noted(from_tensors(folder, config, tensors, None, why), notes)  # pyright: ignore[reportArgumentType]
    config = _tied_too(_as_trained_on(config, skeleton), tensors, skeleton)
    dtype = getattr(skeleton.config, "dtype", None) or torch.float32  # pyright: ignore[reportAttributeAccessIssue]
    bare = copy(config)
    bare.task_type, bare.inference_mode, bare.base_model_name_or_path = None, True, None
    if _kept(config):  # PEFT asks any config for it, also of a type without the field
        setattr(bare, "exclude_modules", never_adapted(config))  # noqa: B010
    defaults = {"modules_to_save": None, "init_lora_weights": True}
    if not any("lora_embedding_" in key for key in tensors):  # what is left to tie is in modules_to_save
        defaults["ensure_weight_tying"] = False
    for field, default in defaults.items():
        if hasattr(bare, field):
            setattr(bare, field, default)
    name_of = to_model(skeleton, prefix=False)
    own = {name for name, _ in skeleton.named_modules()}
    renamed = {module: name_of(f"{module}.weight") for module in modules if module not in own}
    if plain and any(fused for _, fused in renamed.values()):
        why = "it adapts experts one by one; the fold keeps the names of its tensors, as engines read them"
        return _noted(from_tensors(folder, config, tensors, dtype, why), notes)  # pyright: ignore[reportArgumentType]
    moved = {old: new.removesuffix(".weight") for old, (new, _) in renamed.items() if new != f"{old}.weight"}
    if moved:
        tensors = {_moved(key, moved): tensor for key, tensor in tensors.items()}
        bare.target_modules = sorted({*(set(modules) - set(moved)), *moved.values()})  # pyright: ignore
        for field, default in (("rank_pattern", config.r), ("alpha_pattern", config.lora_alpha)):  # pyright: ignore
            setattr(bare, field, patterns_of_moved(moved, getattr(config, field) or {}, default))
        old, new = next(iter(moved.items()))
        notes.append(f"{len(moved)} modules have other names in this version of transformers ({new}, once {old})")
    _hollow(skeleton, dtype)
    named = base or config.base_model_name_or_path
    with fitting(folder, config, named), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice about training
        model = get_peft_model(skeleton, bare).eval()  # pyright: ignore[reportArgumentType]
        places = places_of(skeleton, "default", config)
        heads = _load(model, config, tensors, folder)
    stored = weight_reader(named, config.revision, skeleton)
    whole = vocabulary_of(skeleton, heads, _kept(config))
    source = _source(skeleton, config, "default", places, stored, {k: v for k, v in heads.items() if k not in whole})
    return _noted(replace(source, dtype=dtype, folder=folder, vocabulary=whole, classes=read_classes(folder)), notes)


def _tensors(adapter: SavedAdapter) -> tuple[dict[str, Tensor], list[str]]:
    """An adapter's tensors by the keys that PEFT writes, and what its user should know of theirs."""
    folder, found = adapter.folder, adapter.tensors
    broken = [key for key, tensor in found.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise RankfoldError(
            f"{folder}: NaN or infinity in {broken[0]}; that training diverged, use an earlier checkpoint"
        )
    names, odd = mended(found), wrapped(found)
    if len(set(names.values())) < len(names):
        raise RankfoldError(
            f"{folder}: several of its keys name the same tensor, such as {odd[0] if odd else next(iter(found))}"
        )
    bare = [key for key in found if not key.startswith("base_model.") and names[key] != key and key not in odd]
    notes = []
    if odd:
        notes.append(f"{len(odd)} keys hold names of wrappers, such as {odd[0]}; PEFT and engines apply none of them")
    if bare:
        notes.append(f"{len(bare)} keys lack the prefix {PREFIX}, such as {bare[0]}; PEFT applies none of them")
    return without_copies({names[key]: tensor for key, tensor in found.items()}), notes


def _has_all(model: nn.Module, modules: list[str]) -> bool:
    """Whether a base has every module that an adapter names, by its own names or by those of its files."""
    state, name_of = {*model.state_dict(), *(name for name, _ in model.named_modules())}, to_model(model, prefix=False)
    return all(module in state or name_of(f"{module}.weight")[0] in state for module in modules)


def _as_trained_on(config: PeftConfig, base: nn.Module) -> PeftConfig:
    """The config, with the class of the base where it names neither a task nor a class."""
    if config.task_type or config.auto_mapping:
        return config
    config = copy(config)
    config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return config


def _tied_too(config: PeftConfig, tensors: dict[str, Tensor], base: nn.Module) -> PeftConfig:
    """The config, with the head in modules_to_save that PEFT's `ensure_weight_tying` trained and saved with the embeddings:
    elsewhere nothing ties the copies."""
    if not getattr(config, "ensure_weight_tying", False) or not _kept(config):
        return config
    tied = set(getattr(base, "_tied_weights_keys", None) or {})
    more = [k for k in tensors if not is_saved(k, _kept(config)) and k.removeprefix(PREFIX) in tied]
    config = copy(config)
    config.modules_to_save = [*_kept(config), *(k.removeprefix(PREFIX).removesuffix(".weight") for k in more)]  # pyright: ignore
    return config


def _moved(key: str, moved: dict[str, str]) -> str:
    module, dot, rest = key.removeprefix(PREFIX).rpartition(".lora_")
    return f"{PREFIX}{moved[module]}{dot}{rest}" if module in moved else key


def _noted(source: Source, notes: list[str]) -> Source:
    return replace(source, notes=[*source.notes, *notes])


def _hollow(skeleton: nn.Module, dtype: torch.dtype) -> None:
    """Every parameter becomes one zero seen out × in times: on the CPU, where PEFT makes its adapters, without memory."""
    for module in skeleton.modules():
        for name, old in module.named_parameters(recurse=False):
            hollow = torch.zeros((), dtype=dtype).expand(old.shape)
            setattr(module, name, nn.Parameter(hollow, requires_grad=False))


def _load(model: nn.Module, config: PeftConfig, tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Puts an adapter's tensors into the model and returns those of its heads."""
    expected = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise RankfoldError(
            f"{folder} lacks {len(missing)} of the {len(expected)} tensors that its config asks for on this base, such as "
            f"{missing[0]}; it is damaged, or of another base model (--base)"
        )
    heads = {key: tensor for key, tensor in tensors.items() if key not in expected}
    whole = vocabulary_of(model.get_base_model(), heads, _kept(config))  # pyright: ignore[reportCallIssue]
    foreign = [key for key in heads if key not in whole and not is_saved(key, _kept(config))]
    if foreign:
        raise RankfoldError(
            f"{folder} holds {len(foreign)} tensors that do not belong to its config on this base, such as {foreign[0]}; "
            "it is of another base model (--base), or has trained embeddings or biases, which no LoRA can hold"
        )
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]  # pyright: ignore[reportArgumentType]
    own = {key: tensor for key, tensor in tensors.items() if key in expected}
    loaded = tuner._remap_adapter_state_dict_for_load(
        model=model, config=config, adapter_name="default", state_dict=own
    )
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for key, tensor in loaded.items():
        if key in shapes and shapes[key] != tuple(tensor.shape):
            raise RankfoldError(
                f"{folder}: {key} is {tuple(tensor.shape)}, and on this base it would be {shapes[key]}; "
                "give the base it was trained on with --base FOLDER"
            )
    model.load_state_dict(loaded, strict=False)
    return heads


@dataclass(frozen=True)
class Place:
    """Where one update sits.

    Args:
        module: by the base's name of it.
        layer: PEFT's, which holds the update; one of several where parameters of the module are adapted.
        expert: which of the matrices in the layer's parameter; None where a whole module is adapted.
    """

    site: Site
    module: str
    layer: Any
    expert: int | None = None


def places_of(base: nn.Module, adapter_name: str, config: PeftConfig) -> dict[str, Place]:
    """The updates of an adapter by the names of their sites; raises RankfoldError for those that no plain LoRA can be."""
    wrapped: dict[str, list[Any]] = {}
    for name, module in plain_modules(base):
        if isinstance(module, BaseTunerLayer) and adapter_name in module._get_available_adapters():
            wrapped.setdefault(name.replace(".base_layer", ""), []).append(module)
    if not wrapped:
        raise RankfoldError(f"adapter_name={adapter_name!r}: no layer of the model has it")
    places = {}
    for name, layers in wrapped.items():
        for layer in reversed(layers):  # innermost first, in the order of the parameters
            if isinstance(layer, ParamWrapper):
                sites = sites_of_parameter(name, layer.get_base_layer(), layer.parameter_name)
                places |= {site.name: Place(site, name, layer, i) for i, site in enumerate(sites)}
            else:
                check_kind(name, layer.get_base_layer(), config)
                places[name] = Place(_site(name, layer.get_base_layer()), name, layer)
    return places


def _source(
    base: nn.Module,
    config: PeftConfig,
    adapter_name: str,
    places: dict[str, Place],
    stored: Callable[[str], Tensor],
    heads: dict[str, Tensor],
) -> Source:
    sites, modules, inside, sites_of = [], [], None, {}
    for place in places.values():
        sites_of.setdefault(place.module, []).append(place.site)
    for name, module in plain_modules(base):
        if inside and name.startswith(inside):  # a layer's own parts follow it
            continue
        inside = f"{name}." if name in sites_of else None
        modules.append(name)
        linear = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if name in sites_of or isinstance(linear, nn.Linear | Conv1D):
            sites += sites_of.get(name) or [_site(name, linear)]

    def update(name: str) -> Update:
        place = places[name]

        def weight() -> Tensor:
            found = kind_named(place.site.kind).as_matrix(stored(place.module).double())
            shape = place.site.out_features, place.site.in_features
            if tuple(found.shape) != shape:
                raise RankfoldError(
                    f"{name}: the base's weight is {tuple(found.shape)}, not {shape} as its config says"
                )
            return found

        return update_of(place.layer, adapter_name, config, weight, place.expert)

    layers = {place.module: place.layer for place in places.values()}
    first = next(next(iter(layers.values())).get_base_layer().parameters())
    dtype: torch.dtype = getattr(base, "dtype", None) or first.dtype  # pyright: ignore[reportAssignmentType]
    half = _start(config) in STARTS and dtype in (torch.bfloat16, torch.float16)
    wrapped = [name for name, layer in layers.items() if isinstance(layer, ParamWrapper)]
    return Source(
        method=f"peft:{_start(config) if _start(config) in STARTS else _title(config)}",
        config=config,
        update=update,
        adapted=list(places),
        sites=of_adapted_types(sites, list(places)),
        siblings=siblings(sites, list(places)),
        modules=modules,
        heads=heads,
        dtype=dtype,
        transposed=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        output_head=output_head(base, layers),
        classes=classes_in(getattr(base, "config", None)),
        parameters=[plain_name(name).replace(".base_layer", "") for name, _ in base.named_parameters()]
        if wrapped
        else [],
        experts=modules_of_experts(base, wrapped) if wrapped else {},
        notes=[f"training also rounded the rest of the base to {dtype}; the fold is relative to the base itself"]
        if half
        else [],
    )


def _site(name: str, module: nn.Module) -> Site:
    found = kind_of(module)
    into, out = found.features(module) if found else in_out_features(module)
    kernel = tuple(getattr(module, "kernel_size", ()))
    return Site(name, int(into), int(out), found.name if found else "linear", kernel)  # pyright: ignore[reportArgumentType]


def _kept(config: PeftConfig) -> list[str]:
    return list(getattr(config, "modules_to_save", None) or [])


def _start(config: PeftConfig) -> str:
    return str(getattr(config, "init_lora_weights", "")).lower()


def _title(config: PeftConfig) -> str:
    return "dora" if getattr(config, "use_dora", False) else kind(config).lower()
