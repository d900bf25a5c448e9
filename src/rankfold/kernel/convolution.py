"""y + Σ up ∗ (down ∗ drop(x)) beside a convolution: k×k down, 1×1 up, as the low-rank update of its weight as a matrix.

The matrix of a weight (out, in/groups, k, …) is out × (in/groups·k·…). Every group of channels has the same `down`, and its own
rows of `up`: so the update is one of the weight itself, and merges for any number of groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from rankfold.kernel.layout import Term

_POINTWISE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def convolution_update(y: Tensor, x: Tensor, conv: Any, terms: Sequence[Term]) -> Tensor:
    """y + Σ update(x).

    Args:
        y: the convolution's output, … × out × positions.
        x: its input, … × in × positions.
        conv: the convolution, whose stride, padding, dilation and groups hold.
        terms: one per active adapter.
    """
    for term in terms:
        if not term.blocks:
            continue
        first, *rest = term.blocks
        update = first.concat(*rest).baked().to(x.dtype)
        down = update.down.view(-1, *conv.weight.shape[1:])
        h = conv._conv_forward(F.dropout(x, term.dropout), down.repeat(conv.groups, *[1] * (down.ndim - 1)), None)
        up = update.up.view(*update.up.shape, *[1] * len(conv.kernel_size))
        y = y + _POINTWISE[len(conv.kernel_size)](h, up, groups=conv.groups).to(y.dtype)
    return y
