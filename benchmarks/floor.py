"""The least an eager adapter costs: plain LoRA written out by hand for Llama's layers, for step.py to compare with.

No dropout, no gates, no second adapter, no checks, no casts (the factors have the dtype of the products already), scale 1: what is left
is the base's products, the adapter's six for each linear layer, the activation made again in the backward, and three nodes of
autograd a decoder layer. What an implementation costs above this is its own; what this costs is torch's and the machine's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rankfold.kernel.matmul import add_product_, linear, product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(weight)
        return linear(x.view(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        return product(g.reshape(-1, g.shape[-1]), weight).view(*g.shape[:-1], -1), None


def with_our_products(model: Any) -> nn.Module:
    """A frozen model whose linear layers multiply as the adapted ones do (rankfold/products.py)."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = lambda input, weight=module.weight: _Linear.apply(input, weight)  # pyright: ignore[reportAttributeAccessIssue]
    return model


class _Together(torch.autograd.Function):
    """Layers that read one input."""

    @staticmethod
    def forward(ctx, x, down, *tensors):  # pyright: ignore[reportIncompatibleMethodOverride]
        weights, ups = tensors[::2], tensors[1::2]
        flat = x.view(-1, x.shape[-1])
        h = linear(flat, down)
        outputs = []
        for weight, up, part in zip(weights, ups, h.chunk(len(ups), 1), strict=True):
            outputs.append(linear(flat, weight))
            add_product_(outputs[-1], part, up.T, 1.0)
        ctx.save_for_backward(x, h, down, *tensors)
        return tuple([y.view(*x.shape[:-1], -1) for y in outputs])

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, h, down, *tensors = ctx.saved_tensors
        weights, ups = tensors[::2], tensors[1::2]
        grads = [g.reshape(-1, g.shape[-1]) for g in grads]
        d_ups = [product(part.T, g).T for part, g in zip(h.chunk(len(ups), 1), grads, strict=True)]
        ghs = [product(g, up) for g, up in zip(grads, ups, strict=True)]
        gh = ghs[0] if len(ghs) == 1 else torch.cat(ghs, 1)
        d_down = product(gh.T, x.view(-1, x.shape[-1]))
        dx = product(grads[0], weights[0])
        for g, weight in zip(grads[1:], weights[1:], strict=True):
            add_product_(dx, g, weight, 1.0)
        add_product_(dx, gh, down, 1.0)
        return dx.view(x.shape), d_down, *[t for d in d_ups for t in (None, d)]


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, up, down, down_x, up_e, up_u, down_p, up_y):  # pyright: ignore[reportIncompatibleMethodOverride]
        flat = x.view(-1, x.shape[-1])
        h, r = linear(flat, down_x), len(down_p)
        e, u = linear(flat, gate), linear(flat, up)
        add_product_(e, h[:, :r], up_e.T, 1.0)
        add_product_(u, h[:, r:], up_u.T, 1.0)
        p = F.silu(e).mul_(u)
        y, hp = linear(p, down), linear(p, down_p)
        add_product_(y, hp, up_y.T, 1.0)
        ctx.save_for_backward(x, e, u, h, hp, gate, up, down, down_x, up_e, up_u, down_p, up_y)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, e, u, h, hp, gate, up, down, down_x, up_e, up_u, down_p, up_y = ctx.saved_tensors
        g, flat, r = g.view(-1, g.shape[-1]), x.view(-1, x.shape[-1]), len(down_p)
        s = F.silu(e)
        p = s * u
        d_up_y, gh = product(hp.T, g).T, product(g, up_y)
        d_down_p = product(gh.T, p)
        da = product(g, down, out=p)
        add_product_(da, gh, down_p, 1.0)
        du = s.mul_(da)
        de = da.mul_(u)
        torch.ops.aten.silu_backward.grad_input(de, e, grad_input=de)
        d_up_e, d_up_u = product(h[:, :r].T, de).T, product(h[:, r:].T, du).T
        gh = torch.cat((product(de, up_e), product(du, up_u)), 1)
        d_down_x = product(gh.T, flat)
        dx = product(de, gate)
        add_product_(dx, du, up, 1.0)
        add_product_(dx, gh, down_x, 1.0)
        return dx.view(x.shape), None, None, None, d_down_x, d_up_e, d_up_u, d_down_p, d_up_y


def adapt(model: Any, rank: int) -> nn.Module:
    """A frozen LlamaModel with the above in place of its linear layers."""
    model.requires_grad_(False)
    for layer in model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        dtype = mlp.gate_proj.weight.dtype

        def new(module: nn.Module, name: str, *shape: int, dtype: torch.dtype = dtype) -> Tensor:
            module.register_parameter(name, nn.Parameter((torch.randn(shape) * 0.02).to(dtype)))
            return module.get_parameter(name)

        width, inner = mlp.gate_proj.in_features, mlp.gate_proj.out_features
        weights = [p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        down = new(attention, "down", 3 * rank, width)
        pairs = [t for i, w in enumerate(weights) for t in (w, new(attention, f"up{i}", len(w), rank))]
        wide = attention.o_proj
        pair = new(wide, "down", rank, wide.in_features), wide.weight, new(wide, "up", wide.out_features, rank)
        factors = [new(mlp, "down_x", 2 * rank, width), new(mlp, "up_e", inner, rank), new(mlp, "up_u", inner, rank)]
        factors += [new(mlp, "down_p", rank, inner), new(mlp, "up_y", width, rank)]
        mlp_weights = [p.weight for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        _together(attention, down, pairs)
        wide.forward = lambda x, pair=pair: _Together.apply(x, *pair)[0]
        mlp.forward = lambda x, tensors=(*mlp_weights, *factors): _Mlp.apply(x, *tensors)
    return model


def _together(attention: Any, down: Tensor, pairs: list[Tensor]) -> None:
    """q's, k's and v's in one node, made when q is called."""
    waiting: list[Tensor] = []

    def first(x: Tensor) -> Tensor:
        waiting[:] = _Together.apply(x, down, *pairs)  # pyright: ignore[reportArgumentType]
        return waiting.pop(0)

    attention.q_proj.forward = first
    attention.k_proj.forward = lambda _: waiting.pop(0)
    attention.v_proj.forward = lambda _: waiting.pop(0)
