"""Rank, norm and spectrum of every update of an adapter: rankfold's methods, and PEFT's LoRA.

Computed from the factors in float64. A component counts as kept if it adds anything at all.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from torch import nn

from rankfold.errors import RankfoldError
from rankfold.fold import native, peft_adapters
from rankfold.fold.peft_refusals import check_start
from rankfold.fold.peft_updates import update_of
from rankfold.fold.plain_lora import factors_of, is_plain, modules_of
from rankfold.fold.source import Source, live_base
from rankfold.host import adapter as host
from rankfold.host import registry
from rankfold.host.checkpoint import plain_modules
from rankfold.host.config import LowRankConfig
from rankfold.host.layer import AdaptedLayer
from rankfold.host.parameter_layer import AdaptedParameters
from rankfold.host.peft_api import LoraLayer
from rankfold.inspect.inspection import Inspection, Link, ModuleUpdate
from rankfold.inspect.left_out import left_out, left_out_of
from rankfold.io.formats import SavedAdapter, read_adapter
from rankfold.kernel.factors import Factors

#: The components of an update that are not zero, and how many the adapter has.
Found = tuple[Factors, int]


def inspect_adapter(
    adapter: str | Path | nn.Module, *, adapter_name: str = "default", base: str | None = None
) -> Inspection:
    """Looks at an adapter folder, or at a model that has the adapter.

    Args:
        adapter: folder of the adapter or of its run, a file in it, PeftModel, or a model that an adapter was injected into.
        adapter_name: which, of a model.
        base: for a folder of a rankfold method whose base model has moved; only its config.json is read.

    Raises:
        ValueError: no adapter, tensors that are truncated, foreign or not finite, updates that are not fixed matrices, or
            an adapter of PEFT's other than plain LoRA.
    """
    if isinstance(adapter, nn.Module):
        configs = getattr(adapter, "peft_config", {})
        if adapter_name not in configs:
            raise RankfoldError(f"adapter_name={adapter_name!r}: the model has {', '.join(configs) or 'no adapter'}")
        config, updates = configs[adapter_name], _of_model(adapter, adapter_name)
        return _inspection(type(adapter).__name__, config, updates, left_out_of(config))
    read = read_adapter(adapter, base)
    config, path = read.config, read.path.absolute()
    if isinstance(config, LoraConfig):
        updates = _of_peft_adapter(read, config, base)
    else:
        updates = _of_model(native.weightless(read, base), "default")
    notes = (*left_out(read.named, config), *read.notes)
    return _inspection(f"{path.parent.name}/{path.name}", config, updates, notes)


def _of_model(model: nn.Module, adapter_name: str) -> dict[str, Found]:
    base = live_base(model)
    updates = {}
    for name, module in plain_modules(base):
        if isinstance(module, AdaptedLayer) and adapter_name in module.lowrank_adapters:
            several = isinstance(module, AdaptedParameters)
            updates |= {a.site.name if several else name: _live(*_ours(a)) for a in module.adapters([adapter_name])}
        elif isinstance(module, LoraLayer) and adapter_name in module._get_available_adapters():
            return _of_peft_model(model, base, adapter_name)
    return updates


def _of_peft_model(model: nn.Module, base: nn.Module, adapter_name: str) -> dict[str, Found]:
    config: LoraConfig = model.peft_config[adapter_name]  # pyright: ignore
    _check_plain(config)
    if not is_plain(config):
        return _of_source(peft_adapters.from_model(model, adapter_name))
    updates = {}
    for name, place in peft_adapters.places_of(base, adapter_name, config).items():
        update = update_of(place.layer, adapter_name, config, lambda: torch.empty(0), place.expert)
        assert isinstance(update, Factors)  # a plain one reads no weight
        updates[name] = _live(update, update.rank)
    return updates


def _ours(adapter: host.Adapter) -> tuple[Factors, int]:
    factors = adapter.factors()
    return factors, factors.rank


def _of_peft_adapter(adapter: SavedAdapter, config: LoraConfig, base: str | None) -> dict[str, Found]:
    _check_plain(config)
    check_start(config)
    if not is_plain(config) or config.target_parameters:
        return _of_source(peft_adapters.from_files(adapter, base))
    tensors = adapter.named
    found = {name: factors_of(tensors, config, name) for name in modules_of(tensors)}
    return {name: _live(factors, factors.rank) for name, factors in found.items()}


def _of_source(source: Source) -> dict[str, Found]:
    """Updates that are not one pair of factors in the file: PiSSA's and OLoRA's are relative to a start that they took from the base."""
    found = {name: source.update(name) for name in source.adapted}
    return {name: _live(update, update.rank) for name, update in found.items() if isinstance(update, Factors)}


def _live(factors: Factors, start: int) -> Found:
    """The components that are not zero, and how many there were."""
    wide = factors.detach().to("cpu", torch.float64).balanced()
    return wide.select(wide.up.norm(dim=0) != 0), start


def _check_plain(config: LoraConfig) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA" or config.use_dora:
        what = "DoRA" if config.use_dora else kind
        raise RankfoldError(
            f"peft_type={what}: its update is not a pair of factors; fold it with --rank or --error and look at the fold"
        )


def _inspection(name: str, config: PeftConfig, updates: dict[str, Found], notes: tuple[str, ...]) -> Inspection:
    if not updates:
        raise RankfoldError(f"{name}: it has no layer with this adapter")
    found = tuple(_update(module, *one) for module, one in updates.items())
    if not isinstance(config, LowRankConfig):
        return Inspection(name, "LoRA (PEFT)", found, notes)
    links = tuple(Link(**link) for link in (config.schedule or {}).get("links", ()))
    return Inspection(name, registry.get(config.method).title, found, notes, links)


def _update(module: str, factors: Factors, start: int) -> ModuleUpdate:
    if not (torch.isfinite(factors.up).all() and torch.isfinite(factors.down).all()):
        raise RankfoldError(f"{module}: NaN or infinity in its update; it was saved from a diverged run")
    sigma = factors.svd()[1].tolist() if factors.rank else []
    return ModuleUpdate(module, *factors.shape, start=start, rank=factors.rank, sigma=tuple(sigma))
