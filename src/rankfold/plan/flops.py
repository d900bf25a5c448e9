"""Floating-point operations per token: the base's by formula, an adapter's by counting what its layers do.

    base, forward         2 · in · out of every linear layer (a fused expert: times the experts a token goes to)
    base, with backward   4 · in · out: frozen weights need the gradient of their input alone
    adapter               all matrix products of an adapted layer on `TOKENS` tokens, by torch's counter, less the base's

For a pair of factors of rank q that comes to 2q(in + out) forward and 6q(in + out) with backward. Methods that build a dense
update (LoHa, LoKr) or the norm of one (DoRA) pay for it once per step, and that is divided by the step's tokens. Attention
scores, norms and element-wise products are left out on both sides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from rankfold.errors import RankfoldError
from rankfold.host.layer import AdaptedLayer
from rankfold.plan.layers import adapted_layers, alike, in_and_out
from rankfold.text import first_line

TOKENS = 2048
"""Tokens per step."""


def base_flops(model: nn.Module) -> int:
    """Of one token through every linear layer, forward."""
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) or hasattr(module, "quant_state"):
            into, out = in_and_out(module)
            total += 2 * into * out
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            total += 2 * module.weight.numel()
        else:
            experts = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim == 3)
            total += 2 * experts * _share_of_experts(model, module) if experts else 0
    return int(total)


def _share_of_experts(model: nn.Module, module: nn.Module) -> float:
    """The share of a layer's experts that a token goes to."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k")
    active = next((value for n in names if isinstance(value := getattr(config, n, None), int)), None)
    every = max((p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3), default=1)
    return 1.0 if active is None else min(active / every, 1.0)


def adapter_flops(model: nn.Module) -> tuple[float, float] | None:
    """Of one token, what the adapters of a meta model add: forward, and forward with backward.

    None where a layer cannot be run without values.

    Raises:
        RankfoldError: a layer that cannot be run at all.
    """
    layers = adapted_layers(model)
    forward = both = 0.0
    for names in alike(layers):
        layer: Any = layers[names[0]]
        if hasattr(layer, "link_to"):
            layer.link_to(None, 0)  # alone: its siblings are counted for themselves
        if _is_ours_of_another_kind(layer):
            pairs = len(names) * _of_pairs(layer) * _share_of_experts(model, layer.get_base_layer())
            forward, both = forward + pairs, both + 3 * pairs
            continue
        if not hasattr(layer.get_base_layer(), "weight"):  # fused experts: what they do depends on the routing
            return None
        into, out = in_and_out(layer)
        if layer.get_base_layer().weight.is_floating_point():
            layer.to(torch.bfloat16)  # in float32 our contraction may take another order for so many tokens
        dtype = layer.get_base_layer().weight.dtype
        x = torch.empty(TOKENS, into, device="meta", dtype=dtype if dtype.is_floating_point else torch.float32)
        x.requires_grad_()
        try:
            with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm}) as counter:
                y = layer(x)
                there = counter.get_total_flops()
                if not isinstance(y, Tensor):  # a router of experts gives several
                    return None
                y.backward(torch.empty_like(y))
            back = counter.get_total_flops()
        except RuntimeError:  # torch's, of an operation that needs values
            return None
        except (AttributeError, TypeError) as error:  # a router that is a linear layer and gives several tensors
            raise RankfoldError(
                f"{names[0]}: the adapter cannot run on this {type(layer.get_base_layer()).__name__} ({first_line(error)}); "
                "leave it out of target_modules"
            ) from error
        finally:
            layer.zero_grad()
        base = 2 * TOKENS * into * out
        forward += len(names) * (there - base) / TOKENS
        both += len(names) * (back - 2 * base) / TOKENS
    return forward, both


def _is_ours_of_another_kind(layer: nn.Module) -> bool:
    return isinstance(layer, AdaptedLayer) and not layer.kind.linear


def _of_pairs(layer: AdaptedLayer) -> int:
    """Of one token, or of one position of a convolution's output, forward: by formula, because its input is not a vector."""
    looked_up = layer.kind.name == "embedding"
    groups: int = getattr(layer.get_base_layer(), "groups", 1)
    return sum(
        2 * block.rank * (block.shape[0] + (0 if looked_up else groups * block.shape[1]))
        for adapter in layer.adapters(list(layer.lowrank_adapters))
        for block in adapter.blocks()
    )


def _addmm(added: Any, a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    """torch counts `addmm`, but not `addmm_`."""
    return 2 * a[0] * a[1] * b[1]
