"""Which tensors are an adapter's, what they are called, and whether what is saved or loaded is all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rankfold.errors import RankfoldError
from rankfold.host.adapter import Adapter
from rankfold.host.config import LowRankConfig
from rankfold.host.layer import AdaptedLayer

PREFIX = "lowrank_"
SHARED = "lowrank_shared"  # ModuleDict on the adapted model: adapter name → group key → state
LAYERS = "lowrank_adapters"  # ModuleDict on each AdaptedLayer: adapter name → Adapter
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """Removes what torch.compile, FSDP and activation checkpointing put into a module's name or a key."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def without_wrappers(model: nn.Module) -> nn.Module:
    """What torch.compile, FSDP or activation checkpointing wraps."""
    while (inner := next((model._modules[name] for name in WRAPPERS if name in model._modules), None)) is not None:
        model = inner
    return model


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules but wrappers, by the names that they have without them."""
    return (
        (plain_name(name), module)
        for name, module in model.named_modules()
        if not module._modules.keys() & set(WRAPPERS)
    )


def check_adapter_name(name: str) -> None:
    """Raises RankfoldError for a name that cannot be a key of the ModuleDict that holds a layer's adapters."""
    if not name or "." in name or name in WRAPPERS or hasattr(nn.ModuleDict(), name):
        raise RankfoldError(
            f"adapter_name={name!r} cannot name an adapter: it is empty, has a dot, or is a name that torch keeps for itself "
            "(such as 'half', 'keys' and 'pop'); choose another"
        )


def short_keys(keys: list[str]) -> dict[str, str]:
    """Shortens group names for state dicts and files. Drops the common path, because it changes with the model's class, a prefix
    or a renaming, and keeps only characters that every file system takes.

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


def owned(model: nn.Module, adapter_name: str) -> set[str]:
    """The state-dict keys that belong to one adapter, wrappers' names left out; read off the modules, not off their names."""
    own: set[str] = set()
    for name, module in model.named_modules():
        dot = f"{plain_name(name)}." if plain_name(name) else ""
        if isinstance(module, AdaptedLayer) and adapter_name in module.lowrank_adapters:
            keys: tuple[str, ...] = module.lowrank_adapters[adapter_name].tensor_names  # pyright: ignore[reportAssignmentType]
            own |= {f"{dot}{LAYERS}.{adapter_name}.{key}" for key in keys}
        shared = module._modules.get(SHARED)
        if isinstance(shared, nn.ModuleDict) and adapter_name in shared:
            for group, state in shared[adapter_name].items():  # pyright: ignore[reportCallIssue]
                own |= {f"{dot}{SHARED}.{adapter_name}.{group}.{key}" for key in state.tensor_names}
    return own


def growing(model: nn.Module, adapter_name: str) -> dict[str, int]:
    """The state-dict keys of an adapter's tensors that have grown to any size, and the dimension in which they do."""
    return {
        ".".join(filter(None, (plain_name(name), LAYERS, adapter_name, path, key))): dim
        for name, module in model.named_modules()
        if isinstance(module, AdaptedLayer) and adapter_name in module.lowrank_adapters
        for path, adapter in module.lowrank_adapters[adapter_name].named_modules()  # one, or one per expert
        if isinstance(adapter, Adapter)
        for key, dim in adapter.growing.items()
    }


def grown(model: nn.Module, adapter_name: str) -> dict[str, int]:
    """The size that such tensors have now, by module; without those that are still empty."""
    sizes = {
        adapter.site.name: adapter.get_buffer(key).shape[dim]
        for module in model.modules()
        if isinstance(module, AdaptedLayer)
        for adapter in module.adapters([adapter_name])
        for key, dim in adapter.growing.items()
    }
    return {name: size for name, size in sizes.items() if size}


def weights_before_merging(model: nn.Module) -> dict[str, Tensor]:
    """By state-dict key, the base weights of layers that are merged now, as they were before."""
    return {
        f"{name}.base_layer.weight": before
        for name, module in model.named_modules()
        if isinstance(module, AdaptedLayer) and (before := module.base_weight.before) is not None
    }


def check_whole(config: LowRankConfig, own: set[str], found: dict[str, Tensor]) -> None:
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


def check_scheduled(model: nn.Module, config: LowRankConfig, adapter_name: str) -> None:
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


def check_checkpoint(
    config: LowRankConfig,
    expected: dict[str, Tensor],
    others: set[str],
    found: dict[str, Tensor],
    growing: dict[str, int],
) -> None:
    """Raises ValueError for a checkpoint that lacks tensors, has foreign ones, other shapes, or NaN or infinity.

    Args:
        expected: the adapter's tensors as it is now, by their key in a file.
        others: keys of the model's other tensors, which may be in a file too (a head, resized embeddings).
        found: the file's.
        growing: which of the adapter's may have any size, and in which dimension.
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
    sizes: dict[str, int] = {}
    for key, tensor in ours.items():
        needed = list(expected[key].shape)
        if (dim := growing.get(key)) is not None and tensor.ndim == len(needed):
            needed[dim] = sizes.setdefault(key.rpartition(".")[0], tensor.shape[dim])
        if list(tensor.shape) != needed:
            raise RankfoldError(
                f"The checkpoint of {what} has {key} of shape {tuple(tensor.shape)}, but this model and config need "
                f"{tuple(needed)}: another base model, rank or set of target_modules."
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise RankfoldError(
                f"The checkpoint of {what} has NaN or infinity in {key}: it was saved from a diverged run."
            )


def check_states(model: nn.Module, adapter_name: str, found: dict[str, Tensor]) -> None:
    """Asks every adapter about its own tensors of a file, which are given by their keys in the model."""
    for name, layer in model.named_modules():
        if isinstance(layer, AdaptedLayer) and adapter_name in layer.lowrank_adapters:
            for path, adapter in layer.lowrank_adapters[adapter_name].named_modules():  # one, or one per expert
                if isinstance(adapter, Adapter):
                    place = ".".join(filter(None, (plain_name(name), LAYERS, adapter_name, path)))
                    keys = adapter.tensor_names or tuple(adapter.state_dict())
                    adapter.check_state({key: found[f"{place}.{key}"] for key in keys})
