"""down(act(gate(x)) · up(x)), three adapted linear layers and what is between them, as one node of autograd.

It keeps x and the outputs of gate and up, and makes act(gate) and the product again in its backward: two N × intermediate passes
for two N × intermediate tensors less than autograd keeps for the frozen block. Its results are those of the separate layers.

With e = gate(x), u = up(x), s = act(e), a = s ⊙ u and y = down(a), given g = ∂L/∂y:

    da = g W_down + …        du = da ⊙ s        de = da ⊙ u ⊙ act′(e)        dx from (de, du), as in linears.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rankfold.kernel.fused_pass import FusedPass
from rankfold.kernel.layout import Member, flatten_for_autograd
from rankfold.kernel.linears import is_differentiated_again, no_autocast, restore_shape, to_compute_dtype
from rankfold.kernel.scratch import buffer, scratch_for


@dataclass(frozen=True)
class Activation:
    """An element-wise function: `forward(e, out)`, `backward(grad, e)`, its gradient times `grad`, written into `grad`, and
    `plain(e)`, which autograd can follow."""

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    plain: Callable[[Tensor], Tensor]


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda e, out: torch.ops.aten.gelu.out(e, approximate=approximate, out=out),
        lambda grad, e: torch.ops.aten.gelu_backward.grad_input(grad, e, approximate=approximate, grad_input=grad),
        lambda e: F.gelu(e, approximate=approximate),
    )


SILU = Activation(
    lambda e, out: torch.ops.aten.silu.out(e, out=out),
    lambda grad, e: torch.ops.aten.silu_backward.grad_input(grad, e, grad_input=grad),
    F.silu,
)
GELU, GELU_TANH = _gelu("none"), _gelu("tanh")


def gated_mlp(x: Tensor, gate: Member, up: Member, down: Member, activation: Activation) -> Tensor:
    """down(activation(gate(x)) · up(x)).

    Args:
        x: … × in.
        gate, up: intermediate × in, alike as `low_rank_linears` asks; down: out × intermediate.

    Returns:
        … × out.
    """
    x, (gate, up, down) = to_compute_dtype(x, [gate, up, down])
    assert down.weight is not None
    layout, tensors = flatten_for_autograd(x, [gate, up])
    inner = x.new_empty(*x.shape[:-1], down.weight.shape[1])  # for its shape: a mask is drawn for it
    layout_down, tensors_down = flatten_for_autograd(inner, [down])
    return _GatedMlp.apply(x, activation, layout, layout_down, len(tensors), *tensors, *tensors_down)  # pyright: ignore[reportReturnType]


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, activation, layout, layout_down, count, *tensors):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.scratch = scratch = scratch_for(x)
        first, last = FusedPass(layout, tensors[:count]), FusedPass(layout_down, tensors[count:])
        with no_autocast([x]):
            (e, u), hidden = first.forward(x.reshape(-1, x.shape[-1]), scratch)
            product = activation.forward(e, buffer(scratch, "product", e.shape, e)).mul_(u)
            (y,), hidden_down = last.forward(product, scratch, overwrite=True)
        ctx.activation, ctx.layout, ctx.layout_down, ctx.count = activation, layout, layout_down, count
        kept_x = x if first.reads_input else None
        kept_hidden = (*first.kept_hidden(hidden), *last.kept_hidden(hidden_down))
        ctx.save_for_backward(kept_x, e, u, *kept_hidden, *first.kept, *last.kept)
        ctx.shape = x.shape
        return restore_shape(y, x.shape)

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        with no_autocast([g]):
            x, e, u, *saved = ctx.saved_tensors
            n, m = len(ctx.layout.inv_keeps), len(ctx.layout_down.inv_keeps)
            hidden, hidden_down, tensors = saved[:n], saved[n : n + m], saved[n + m :]
            first, last = FusedPass(ctx.layout, tensors[: ctx.count]), FusedPass(ctx.layout_down, tensors[ctx.count :])
            need_x, _, _, _, _, *needed = ctx.needs_input_grad
            if is_differentiated_again():
                return _differentiable_backward(first, last, ctx.activation, x, e, u, g, need_x, needed, ctx.count)
            scratch = scratch_for(e)
            s = ctx.activation.forward(e, buffer(scratch, "activation", e.shape, e))
            product = torch.mul(s, u, out=buffer(scratch, "product", e.shape, e)) if last.reads_input else None
            da, others_down = last.backward(
                product, hidden_down, [g], True, needed[ctx.count :], scratch, overwrite=True
            )
            assert da is not None
            du = s.mul_(da)
            de = ctx.activation.backward(da.mul_(u), e)
            flat = None if x is None else x.reshape(-1, x.shape[-1])
            dx, others = first.backward(flat, hidden, [de, du], need_x, needed[: ctx.count], scratch)
            ctx.scratch = None  # as in contraction.py
            return None if dx is None else dx.view(ctx.shape), None, None, None, None, *others, *others_down


def _differentiable_backward(
    first: FusedPass,
    last: FusedPass,
    activation: Activation,
    x: Tensor | None,
    e: Tensor,
    u: Tensor,
    g: Tensor,
    need_x: bool,
    needed: list,
    count: int,
) -> tuple:
    """As the node's backward, out of torch's own operations; see `FusedPass.differentiable_backward`."""
    if x is None:
        raise RuntimeError(
            "a backward with create_graph=True through adapters whose every `down` is frozen needs their input, which is not kept; "
            "run the forward inside rankfold.kernel.linears.separate_order()"
        )
    if any(needed[i] for i in (first.layout.bias(0), first.layout.bias(1), count + last.layout.bias(0))):
        raise RuntimeError(
            "a backward with create_graph=True through a fused MLP whose biases are trained is not supported; set fuse_mlp=False"
        )
    tensors = [*first.tensors, *last.tensors]
    wanted = [i for i, need in enumerate(needed) if need]
    with torch.enable_grad():
        outputs = [first.plain_output(x, member) for member in (0, 1)]
        # Biases are not kept, so the values are the saved outputs' and the graph is that of the products
        e, u = (plain + (saved - plain).detach() for plain, saved in zip(outputs, (e, u), strict=True))
        product = activation.plain(e) * u
        y = last.plain_output(product, 0)
        sources = ([x] if need_x else []) + [tensors[i] for i in wanted]
        made = list(torch.autograd.grad(y, sources, g, create_graph=True, allow_unused=True))
    dx = made.pop(0) if need_x else None
    found: list[Tensor | None] = [None] * len(needed)
    for i, gradient in zip(wanted, made, strict=True):
        found[i] = gradient
    return dx, None, None, None, None, *found
