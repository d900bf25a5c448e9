"""The kinds of modules that an adapter can sit on: one row per kind, and one file per layer that hosts them.

kind = kind_of(module)          # None: nothing here adapts it
kind.features(module)           # (in, out)
"""

from __future__ import annotations

from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankfold.host.layer import Kind
from rankfold.host.linear_layer import AdaptedLinear
from rankfold.host.peft_api import in_out_features


def _features(base: nn.Module) -> tuple[int, int]:
    into, out = in_out_features(base)
    return int(into), int(out)  # pyright: ignore[reportArgumentType]


def _linear(base: nn.Module) -> bool:
    return isinstance(base, nn.Linear)


def _conv1d(base: nn.Module) -> bool:
    return isinstance(base, Conv1D)


def _quantised_linear(base: nn.Module) -> bool:
    backend = resolve_quantization_backend(base, get_apply_tensor_subclass=lambda: None)
    return backend is not None and backend.layer_type == "linear"


def _transposed(delta: Tensor) -> Tensor:
    return delta.T


#: The first that fits counts. Functions of this module and no lambdas: a model is pickled with the kinds of its layers.
KINDS = (
    Kind("linear", _linear, AdaptedLinear, _features),
    Kind("conv1d", _conv1d, AdaptedLinear, _features, in_weight_layout=_transposed),
    Kind("quantised linear", _quantised_linear, AdaptedLinear, _features),
)


def kind_of(base: nn.Module) -> Kind | None:
    """The first row that fits a base module; None where nothing here adapts it."""
    return next((kind for kind in KINDS if kind.fits(base)), None)
