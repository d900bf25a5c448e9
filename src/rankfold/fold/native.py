"""A rankfold adapter as the source of a fold: a live model, or a folder put on a weightless copy of its base."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import torch
from peft import (
    PEFT_TYPE_TO_TUNER_MAPPING,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankfold.errors import RankfoldError
from rankfold.fold.sites import modules_of_experts, of_adapted_types, siblings, unlike_peft
from rankfold.fold.source import (
    Source,
    base_skeleton,
    fitting,
    folding_device,
    live_base,
    never_adapted,
    output_head,
    saved_live,
    vocabulary_of,
)
from rankfold.host import registry
from rankfold.host.adapter import not_fixed
from rankfold.host.checkpoint import LAYERS, SHARED, plain_modules, plain_name
from rankfold.host.config import LowRankConfig
from rankfold.host.layer import AdaptedLayer
from rankfold.host.parameter_layer import AdaptedParameters
from rankfold.host.planning import site_of
from rankfold.io.adapter_names import without_copies
from rankfold.io.adapters import classes_in, read_classes
from rankfold.io.formats import SavedAdapter
from rankfold.kernel.factors import Factors


def from_model(model: nn.Module, adapter_name: str = "default", heads: dict[str, Tensor] | None = None) -> Source:
    """Reads a live model, PeftModel or injected.

    Raises:
        ValueError: no adapter of that name, one that is not rankfold's, a schedule that never ran, or an update that is
            not a fixed matrix.
    """
    base = live_base(model)
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is None:
        raise RankfoldError(f"adapter_name={adapter_name!r}: the model has {sorted(getattr(model, 'peft_config', {}))}")
    config = check_foldable(config, attached=_attached(base, adapter_name))
    layers, sites, modules, adapters = {}, [], [], {}
    for name, module in plain_modules(base):
        if f".{LAYERS}." in f".{name}." or name.startswith(SHARED) or name.endswith(".base_layer"):
            continue
        modules.append(name)
        if isinstance(module, AdaptedLayer) and adapter_name in module.lowrank_adapters:
            layers[name] = module
            own = {a.site.name: a for a in module.adapters([adapter_name])}
            adapters |= own if isinstance(module, AdaptedParameters) else {name: next(iter(own.values()))}
        if isinstance(module, AdaptedParameters):
            sites += [adapter.site for adapter in module.adapters([adapter_name])]
        elif isinstance(module, (AdaptedLayer, nn.Linear, Conv1D)):
            sites.append(site_of(name, module))

    def update(name: str) -> Factors:
        trained = adapters[name].factors().detach()
        return trained.to(folding_device(trained.down), torch.float64)

    schedule = config.schedule or {}
    unfinished = schedule and not schedule.get("finished")
    first = next(next(iter(layers.values())).get_base_layer().parameters())
    return Source(
        method=config.method,
        config=config,
        update=update,
        blocks=lambda name: adapters[name].update(),
        adapted=list(adapters),
        sites=of_adapted_types(sites, list(adapters)),
        siblings=siblings(sites, list(adapters)),
        modules=modules,
        heads=_heads(model, adapter_name) if heads is None else heads,
        dtype=getattr(base, "dtype", first.dtype),
        transposed=any(getattr(layer, "transposed", False) for layer in layers.values()),
        output_head=output_head(base, layers),
        classes=classes_in(getattr(base, "config", None)),
        parameters=[plain_name(name).replace(".base_layer.", ".") for name, _ in base.named_parameters()]
        if config.target_parameters
        else [],
        experts=modules_of_experts(
            base, [name for name, layer in layers.items() if isinstance(layer, AdaptedParameters)]
        ),
        unlike_peft=[name for name, layer in layers.items() if unlike_peft(layer.get_base_layer())],
        notes=[f"the schedule had not finished: step {schedule['step']} of {schedule['total_steps']}"]
        if unfinished
        else [],
    )


def from_files(adapter: SavedAdapter, base: str | None = None) -> Source:
    """Reads an adapter folder; arguments and errors as `weightless`."""
    model = weightless(adapter, base)
    heads = {k: v for k, v in without_copies(adapter.named).items() if not _is_ours(k)}
    # of the skeleton, the config knows the dtype of the weights it was saved with; its tensors do not
    dtype = getattr(model.get_base_model().config, "dtype", None) or torch.float32
    whole = vocabulary_of(model.get_base_model(), heads, check_foldable(adapter.config).modules_to_save or [])
    source = from_model(model, heads={key: tensor for key, tensor in heads.items() if key not in whole})
    return replace(
        source,
        config=adapter.config,
        dtype=dtype,
        vocabulary=whole,
        folder=adapter.folder,
        classes=read_classes(adapter.folder),
    )


def weightless(adapter: SavedAdapter, base: str | None = None) -> PeftModel:
    """An adapter folder on its base, whose weights are on the meta device: only its config.json is needed.

    Args:
        adapter: what `save_pretrained` wrote.
        base: folder or hub id of the base model, if not the one in the config.

    Raises:
        ValueError: tensors that are truncated, foreign or not finite; a base that cannot be read; as `from_model`.
    """
    folder, config = adapter.folder, check_foldable(adapter.config)
    ours = {k: v for k, v in adapter.tensors.items() if _is_ours(k)}
    bare: LowRankConfig = copy(config)
    # The head is copied as it is; leaving it out here makes the number of labels irrelevant
    bare.exclude_modules = never_adapted(config)
    bare.modules_to_save, bare.task_type, bare.inference_mode = None, None, True
    bare.base_model_name_or_path = None  # PEFT warns when a base moves
    skeleton = base_skeleton(config, base)
    with fitting(folder, config, base or config.base_model_name_or_path):
        model = get_peft_model(skeleton, bare, low_cpu_mem_usage=True, autocast_adapter_dtype=False)  # pyright: ignore
    # PEFT's own loader would move the tensors to the base's device, which is meta
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[bare.peft_type]  # pyright: ignore[reportArgumentType]
    renamed = tuner._remap_adapter_state_dict_for_load(model, bare, "default", ours)
    model.load_state_dict(renamed, strict=False, assign=True)
    return model  # pyright: ignore[reportReturnType]


def _is_ours(key: str) -> bool:
    return f".{LAYERS}." in key or f".{SHARED}." in key


def _attached(base: nn.Module, adapter_name: str) -> bool:
    """Whether a controller runs the adapter's schedule here: before its first step the config has no schedule yet."""
    layers = (module for module in base.modules() if isinstance(module, AdaptedLayer))
    return any(adapter.scheduled for layer in layers for adapter in layer.adapters([adapter_name]))


def check_foldable(config: PeftConfig, attached: bool = False) -> LowRankConfig:
    """The config, if its adapter has a fold; raises ValueError that says why not.

    Args:
        attached: whether a controller runs its schedule on a live model.
    """
    if not isinstance(config, LowRankConfig):
        raise RankfoldError(
            f"peft_type={getattr(config.peft_type, 'value', config.peft_type)} is not one of rankfold's methods"
        )
    method = registry.get(config.method)
    if not config.fixed:
        raise RankfoldError(not_fixed(method.title, config))
    if config.trainable_token_indices:
        raise RankfoldError(
            f"trainable_token_indices={config.trainable_token_indices}: it trains rows of the embedding, which no LoRA holds; "
            "save what merge_and_unload() gives"
        )
    if method.controller is not None and not (config.schedule or attached or config.allow_unscheduled):
        raise RankfoldError(
            f"this {config.method} adapter was saved without its schedule having run, so its ranks were never chosen; "
            "train it with rankfold.attach or AdapterCallback, or set allow_unscheduled in its config"
        )
    return config


def _heads(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    return {
        k: v for k, v in saved_live(model, adapter_name).items() if f".{LAYERS}." not in k and f"{SHARED}." not in k
    }
