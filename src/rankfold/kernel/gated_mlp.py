"""down(act(gate(x)) · up(x)), three adapted linear layers and what is between them, as one node of autograd.

It keeps x and the outputs of gate and up, and makes act(gate) and the product again in its backward: two N × intermediate passes
for two N × intermediate tensors less than autograd keeps for the frozen block. The numbers are those of the separate layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankfold.kernel.linears import MERGED, Call, Member, flat_arguments, no_autocast, shaped, to_compute_dtype
from rankfold.kernel.scratch import scratch_for, take

#: Places in scratch memory.
PRODUCT, ACTIVATED = MERGED + 1, MERGED + 2


@dataclass(frozen=True)
class Activation:
    """An element-wise function: `forward(e, out)`, and `backward(grad, e)`, its gradient times `grad`, written into `grad`."""

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda e, out: torch.ops.aten.gelu.out(e, approximate=approximate, out=out),
        lambda grad, e: torch.ops.aten.gelu_backward.grad_input(grad, e, approximate=approximate, grad_input=grad),
    )


SILU = Activation(
    lambda e, out: torch.ops.aten.silu.out(e, out=out),
    lambda grad, e: torch.ops.aten.silu_backward.grad_input(grad, e, grad_input=grad),
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
    layout, tensors = flat_arguments(x, [gate, up])
    inner = x.new_empty(*x.shape[:-1], down.weight.shape[1])  # for its shape: a mask is drawn for it
    layout_down, tensors_down = flat_arguments(inner, [down])
    return _GatedMlp.apply(x, activation, layout, layout_down, len(tensors), *tensors, *tensors_down)  # pyright: ignore[reportReturnType]


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, activation, layout, layout_down, count, *tensors):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.scratch = scratch = scratch_for(x)
        first, last = Call(layout, tensors[:count]), Call(layout_down, tensors[count:])
        with no_autocast([x]):
            (e, u), hidden = first.forward(x.reshape(-1, x.shape[-1]), scratch)
            product = activation.forward(e, take(scratch, PRODUCT, e.shape, e)).mul_(u)
            (y,), hidden_down = last.forward(product, scratch, overwrite=True)
        ctx.activation, ctx.layout, ctx.layout_down, ctx.count = activation, layout, layout_down, count
        kept_x = x if first.reads_input else None
        ctx.save_for_backward(kept_x, e, u, *hidden, *hidden_down, *first.kept, *last.kept)
        ctx.shape = x.shape
        return shaped(y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        with no_autocast([g]):
            x, e, u, *saved = ctx.saved_tensors
            n, m = len(ctx.layout.inv_keeps), len(ctx.layout_down.inv_keeps)
            hidden, hidden_down, tensors = saved[:n], saved[n : n + m], saved[n + m :]
            first, last = Call(ctx.layout, tensors[: ctx.count]), Call(ctx.layout_down, tensors[ctx.count :])
            need_x, _, _, _, _, *needed = ctx.needs_input_grad
            scratch = scratch_for(e)
            s = ctx.activation.forward(e, take(scratch, ACTIVATED, e.shape, e))
            product = torch.mul(s, u, out=take(scratch, PRODUCT, e.shape, e)) if last.reads_input else None
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
