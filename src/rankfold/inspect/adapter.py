"""Rank, norm and spectrum of every update of an adapter: rankfold's methods, and PEFT's plain LoRA.

All numbers are of ΔW itself, gate and scale included, from its factors in float64. Effective rank is Roy and Vetterli's
(EUSIPCO 2007), exp of the entropy of σ/Σσ; stable rank is ‖ΔW‖²_F/σ₁²; the energy rank is the least number of σ that hold
99 % of ‖ΔW‖²_F. A component counts as kept if it adds anything at all.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from rankfold.errors import RankfoldError
from rankfold.fold import native as ours
from rankfold.fold import source
from rankfold.host import registry
from rankfold.host.config import LowRankConfig
from rankfold.host.layer import AdaptedLayer
from rankfold.inspect.grid import Grid, grid
from rankfold.kernel.factors import Factors

if TYPE_CHECKING:
    from rich.console import Group

ENERGY = 0.99
#: The components of an update that are not zero, and how many the adapter has.
Found = tuple[Factors, int]


@dataclass(frozen=True)
class Update:
    """The update of one weight.

    Args:
        module: its name.
        out, into: the weight's shape.
        start: components that the adapter has.
        rank: those that are not zero.
        sigma: the singular values of ΔW, descending.
    """

    module: str
    out: int
    into: int
    start: int
    rank: int
    sigma: tuple[float, ...]

    @property
    def norm(self) -> float:
        """‖ΔW‖_F."""
        return math.sqrt(sum(s * s for s in self.sigma))

    @property
    def effective_rank(self) -> float:
        total = sum(self.sigma)
        shares = [s / total for s in self.sigma if s > 0] if total > 0 else []
        return math.exp(-sum(p * math.log(p) for p in shares)) if shares else 0.0

    @property
    def stable_rank(self) -> float:
        return (self.norm / self.sigma[0]) ** 2 if self.norm > 0 else 0.0

    @property
    def energy_rank(self) -> int:
        kept, total = 0.0, self.norm**2
        for i, s in enumerate(self.sigma, 1):
            kept += s * s
            if total > 0 and kept >= ENERGY * total:
                return i
        return 0


@dataclass(frozen=True)
class Inspection:
    """An adapter, looked at.

    Args:
        name: what was looked at, for titles.
        method: what the adapter is.
        updates: in the model's order.
    """

    name: str
    method: str
    updates: tuple[Update, ...]

    @cached_property
    def grid(self) -> Grid:
        return grid(u.module for u in self.updates)

    @property
    def rank(self) -> int:
        """Components kept, of all updates together."""
        return sum(u.rank for u in self.updates)

    @property
    def start(self) -> int:
        return sum(u.start for u in self.updates)

    @property
    def norm(self) -> float:
        """Of all updates together."""
        return math.sqrt(sum(u.norm**2 for u in self.updates))

    @property
    def parameters(self) -> int:
        """Numbers of the plain LoRA that holds just the kept components."""
        return sum(u.rank * (u.out + u.into) for u in self.updates)

    def table(self, width: int = 80) -> Group:
        """For a terminal: heat tables of rank with norm and of the spectrum, and a summary by kind of module."""
        from rankfold.inspect.terminal import show_adapter

        return show_adapter(self, width)

    def heatmap(self, path: str | Path) -> None:
        """Rank, norm and effective rank by layer and kind, and the spectra; SVG, PNG or PDF by the file's ending."""
        from rankfold.inspect.pictures import draw_adapter

        draw_adapter(self, Path(path))

    def to_json(self) -> str:
        derived = ("norm", "effective_rank", "stable_rank", "energy_rank")
        updates = [{**asdict(u), **{key: getattr(u, key) for key in derived}} for u in self.updates]
        whole = {key: getattr(self, key) for key in ("name", "method", "rank", "start", "norm", "parameters")}
        return json.dumps({**whole, "updates": updates}, indent=2) + "\n"


def inspect_adapter(
    adapter: str | Path | nn.Module, *, adapter_name: str = "default", base: str | None = None
) -> Inspection:
    """Looks at an adapter folder, or at a model that has the adapter.

    Args:
        adapter: folder, PeftModel, or a model that an adapter was injected into.
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
        return _inspection(type(adapter).__name__, configs[adapter_name], _of_model(adapter, adapter_name))
    folder = Path(adapter).absolute()
    config = source.read_config(folder)
    if isinstance(config, LoraConfig):
        updates = _of_peft_folder(source.read_tensors(folder), config)
    else:
        updates = _of_model(ours.weightless(folder, config, base), "default")
    return _inspection(f"{folder.parent.name}/{folder.name}", config, updates)


def _of_model(model: nn.Module, adapter_name: str) -> dict[str, Found]:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    updates = {}
    for name, module in base.named_modules():
        if isinstance(module, AdaptedLayer) and adapter_name in module.lowrank_adapters:
            updates[name] = _live(*_ours(module, adapter_name))
        elif isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            _check_plain(model.peft_config[adapter_name])  # pyright: ignore
            down, up = (part[adapter_name].weight for part in (module.lora_A, module.lora_B))
            assert isinstance(down, Tensor)
            assert isinstance(up, Tensor)
            updates[name] = _live(_pair(name, down, up, module.scaling[adapter_name]), len(down))
    return updates


def _ours(layer: AdaptedLayer, adapter_name: str) -> tuple[Factors, int]:
    (adapter,) = layer.adapters([adapter_name])
    return adapter.factors(), sum(block.rank for block in adapter.blocks())


def _of_peft_folder(tensors: dict[str, Tensor], config: LoraConfig) -> dict[str, Found]:
    _check_plain(config)
    updates = {}
    for key, down in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
        up = tensors.get(key.replace(".lora_A.", ".lora_B."))
        if up is None:
            raise RankfoldError(f"adapter_model.safetensors has {key} without its lora_B; the file is incomplete")
        pattern = config.alpha_pattern or {}
        alpha = pattern.get(get_pattern_key(list(pattern), name), config.lora_alpha)
        r = len(down)
        updates[name] = _live(_pair(name, down, up, alpha / (math.sqrt(r) if config.use_rslora else r)), r)
    return updates


def _pair(name: str, down: Tensor, up: Tensor, scale: float) -> Factors:
    if down.ndim != 2:
        raise RankfoldError(f"{name}: a LoRA of a convolution; only those of linear layers are looked at")
    return Factors(down, up, scale=scale)


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


def _inspection(name: str, config: PeftConfig, updates: dict[str, Found]) -> Inspection:
    if not updates:
        raise RankfoldError(f"{name}: it has no linear layer with this adapter")
    method = registry.get(config.method).title if isinstance(config, LowRankConfig) else "LoRA (PEFT)"
    return Inspection(name, method, tuple(_update(module, *found) for module, found in updates.items()))


def _update(module: str, factors: Factors, start: int) -> Update:
    if not (torch.isfinite(factors.up).all() and torch.isfinite(factors.down).all()):
        raise RankfoldError(f"{module}: NaN or infinity in its update; it was saved from a diverged run")
    sigma = factors.svd()[1].tolist() if factors.rank else []
    return Update(module, *factors.shape, start=start, rank=factors.rank, sigma=tuple(sigma))
