"""AdaptedConv: the layer over a convolution (nn.Conv1d, Conv2d, Conv3d); its adapters see the weight as a matrix."""

from __future__ import annotations

from torch import Tensor

from rankfold.host.adapter import Adapter
from rankfold.host.layer import AdaptedLayer
from rankfold.kernel.convolution import convolution_update


class AdaptedConv(AdaptedLayer):
    """A convolution with any number of adapters beside it."""

    def added(self, adapter: Adapter, y: Tensor, x: Tensor) -> Tensor:
        return convolution_update(y, x, self.get_base_layer(), adapter.terms())
