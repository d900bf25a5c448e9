"""AdaptedEmbedding: the layer over an nn.Embedding. An adapter's `down` is rank × rows of the table, and its `up` dim × rank."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from rankfold.host.adapter import Adapter
from rankfold.host.layer import AdaptedLayer


class AdaptedEmbedding(AdaptedLayer):
    """An embedding with any number of adapters beside it. Dropout does not apply: its input is an index."""

    def added(self, adapter: Adapter, y: Tensor, x: Tensor) -> Tensor:
        base: Any = self.get_base_layer()
        first, *rest = adapter.term().blocks
        update = first.concat(*rest).baked()
        h = F.embedding(x, update.down.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        added = h @ update.up.T
        scale = self._get_embed_scale()  # Gemma's tables multiply what they look up
        return y + (added if scale is None else added * scale.to(added.dtype)).to(y.dtype)
