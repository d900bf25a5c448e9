"""Memory for what is needed only while one node of autograd computes, used again by the next node.

    scratch = scratch_for(x)                 # None where the allocator keeps what it is given
    a = buffer(scratch, "input", x.shape, x) # contents undefined

A CPU's allocator hands large buffers back to the system as soon as they are freed, and touching a fresh page costs more than the
arithmetic on it. So the nodes of a thread hold one `Scratch` together, until their backward.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from rankfold.kernel.matmul import is_subclass


class Scratch:
    """Buffers by use and dtype. A node must not expect its buffers to survive it."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}


_of_thread: WeakValueDictionary[int, Scratch] = WeakValueDictionary()


def scratch_for(x: Tensor) -> Scratch | None:
    """The `Scratch` that other nodes of this thread hold, or a new one. None where nothing is gained or allowed: on accelerators,
    whose allocators keep memory, for tensor subclasses, in inference mode, and while a compiler traces."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or is_subclass(x) or torch.is_inference_mode_enabled():
        return None
    thread = threading.get_ident()
    found = _of_thread.get(thread)
    if found is None:
        found = _of_thread[thread] = Scratch()
    return found


def buffer(scratch: Scratch | None, use: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """A contiguous tensor with the dtype and device of `like`, its contents undefined.

    Args:
        use: what it holds; two buffers needed at the same time must have different uses.
    """
    if scratch is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    n = torch.Size(shape).numel()
    found = scratch.buffers.get((use, like.dtype))
    if found is None or found.numel() < n:
        found = scratch.buffers[use, like.dtype] = torch.empty(n, dtype=like.dtype, device=like.device)
    return found[:n].view(shape)
