"""`model.add_weighted_adapter` of PEFT on our models: a new adapter whose update is the exact weighted sum of others.

Only plain LoRA has such an adapter of its own kind: two updates side by side are one of the sum of their ranks. What shares
state or has gates has none, and `rankfold combine` makes a plain LoRA of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rankfold.errors import RankfoldError
from rankfold.host.adapter import Adapter
from rankfold.host.checkpoint import check_adapter_name, plain_name
from rankfold.host.config import LowRankConfig
from rankfold.host.layer import AdaptedLayer
from rankfold.host.peft_api import exact_pattern
from rankfold.kernel.factors import Factors

COMBINE = "save them and run `rankfold combine A B --weights ... -o OUT`, which makes a plain LoRA of any of them"


def check(
    adapter_cls: type[Adapter],
    configs: dict[str, Any],
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    kind: str,
    others: dict[str, Any],
) -> None:
    """Raises RankfoldError for names, weights, a combination or a method that has no such sum."""
    unknown = [a for a in adapters if a not in configs]
    if unknown or not adapters:
        raise RankfoldError(f"adapters={list(adapters)}: the model has {', '.join(configs)}")
    if name in configs:
        raise RankfoldError(f"adapter_name={name!r} exists; delete_adapter() it or choose another name")
    check_adapter_name(name)
    if len(weights) != len(adapters) or not all(math.isfinite(w) for w in weights):
        raise RankfoldError(f"weights={list(weights)} must be {len(adapters)} finite numbers, one per adapter")
    if not vars(adapter_cls).get("stackable", False):
        method = configs[adapters[0]].method
        raise RankfoldError(f"add_weighted_adapter: a sum of {method} adapters is not a {method} adapter; {COMBINE}")
    if any(configs[a].target_parameters for a in adapters):
        raise RankfoldError(f"add_weighted_adapter: target_parameters has no sum on a live model; {COMBINE}")
    rest = ("ensure_weight_tying", "trainable_token_indices")
    if field := next((f for f in rest if any(getattr(configs[a], f) for a in adapters)), None):
        raise RankfoldError(
            f"add_weighted_adapter: {field}: what it trains beside the factors of one module has no sum here; leave out such an adapter"
        )
    if kind not in ("cat", "linear"):
        raise RankfoldError(
            f"combination_type={kind!r} is not exact, and a live model has no place to state its error; {COMBINE} (--rank, --error, "
            "--combination), or choose 'cat'"
        )
    if any(value is not None for value in others.values()):
        raise RankfoldError(
            f"add_weighted_adapter: {', '.join(others)} is of approximations; 'cat' and 'linear' are exact"
        )
    heads = next((a for a in adapters if configs[a].modules_to_save), None)
    if heads is not None:
        raise RankfoldError(
            f"add_weighted_adapter: {heads!r} has a trained head (modules_to_save={configs[heads].modules_to_save}), of which there "
            f"is not a sum; {COMBINE} and keeps the head where there is one"
        )


def sums(model: nn.Module, adapters: Sequence[str], weights: Sequence[float], kind: str) -> dict[str, Factors]:
    """Σ wᵢ ΔWᵢ of every module that has any of the adapters, gate and scale baked in, in float64.

    Raises:
        RankfoldError: "linear" where the sum needs more rank than its terms have.
    """
    found: dict[str, Factors] = {}
    for layer in model.modules():
        if not isinstance(layer, AdaptedLayer):
            continue
        had = [(w, one) for a, w in zip(adapters, weights, strict=True) for one in layer.adapters([a])]
        if had:
            name = had[0][1].site.name  # without what a wrapper puts before it
            terms = [adapter.factors().detach().to(torch.float64).scaled(w).baked() for w, adapter in had]
            found[name] = terms[0].concat(*terms[1:]) if kind == "cat" else _same_rank(name, terms)
    return found


def _same_rank(name: str, terms: Sequence[Factors]) -> Factors:
    """The sum where all have one of the two factors in common, and so the rank of one of them."""
    first = terms[0]
    if all(torch.equal(t.down, first.down) for t in terms):
        return Factors(first.down, torch.stack([t.up for t in terms]).sum(0))
    raise RankfoldError(
        f"combination_type='linear': at {name} the adapters have different ranks or different `down`, so their sum needs more rank "
        "than they have; choose 'cat', which is exact, or `rankfold combine --rank N`, which states its error"
    )


def config_of(first: LowRankConfig, found: dict[str, Factors], model: nn.Module) -> LowRankConfig:
    """The new adapter's: each module its own rank, scale 1. Names are exact, whatever patterns the others had."""
    ranks = {name: factors.rank for name, factors in found.items()}
    largest = max(ranks.values())
    other = {exact_pattern(n): r for n, r in ranks.items() if r != largest}
    names = [plain_name(n) for n, _ in model.named_modules()]
    unique = not any(n != t and n.endswith(f".{t}") for t in found for n in names)
    return replace(
        first,
        r=largest,
        lora_alpha=largest,
        use_rslora=False,
        rank_pattern=other,
        alpha_pattern=dict(other),
        target_modules=list(found) if unique else "|".join(map(re.escape, found)),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        lora_dropout=0.0,
        inference_mode=True,
    )


def fill(model: nn.Module, name: str, found: dict[str, Factors]) -> None:
    """Gives the new adapter its values."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, AdaptedLayer) and name in layer.lowrank_adapters:
                adapter: Any = layer.lowrank_adapters[name]
                assert adapter.scaling == 1.0, adapter.site
                adapter.down.copy_(found[adapter.site.name].down)
                adapter.up.copy_(found[adapter.site.name].up)
                adapter.has_history = True
