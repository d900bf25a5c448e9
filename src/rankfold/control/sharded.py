"""Gives schedules whole tensors where FSDP2 leaves every process only a shard of each parameter.

Every process computes the same scores from whole tensors, so all of them cut the same components. These functions are
collectives for a sharded tensor: every process calls them, in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, distribute_tensor


def whole(t: Tensor) -> Tensor:
    """`t` itself, or all shards of it together; gradients go back to the shards."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def gathered(t: DTensor) -> Tensor:
    """All shards together, for a forward on this process's own part of the batch: gradients are averaged over the processes on
    their way back, as FSDP2 does with a parameter of its own unit."""
    return t.full_tensor(grad_placements=[Partial("avg")] * t.device_mesh.ndim)


def zero_(p: Tensor, out: Tensor) -> None:
    """Zeroes the entries of `p` that `out` (whole, bool, of p's shape) names, in place."""
    if isinstance(p, DTensor):
        p.mul_(distribute_tensor((~out).to(p.dtype), p.device_mesh, p.placements, src_data_rank=None))
    else:
        p[out] = torch.zeros((), dtype=p.dtype, device=p.device)


def fill_(p: Tensor, values: Tensor) -> None:
    """Copies `values` (whole, of p's shape, the same on every process) into `p`."""
    values = values.to(p.device, p.dtype)
    p.copy_(distribute_tensor(values, p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else values)  # fmt: skip
