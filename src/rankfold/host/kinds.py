"""The kinds of modules that an adapter can sit on: one row per kind, and one file per layer that hosts them.

kind = kind_of(module)          # None: nothing here adapts it
kind.features(module)           # (in, out)
"""

from __future__ import annotations

from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankfold.host.conv_layer import AdaptedConv
from rankfold.host.embedding_layer import AdaptedEmbedding
from rankfold.host.layer import Kind
from rankfold.host.linear_layer import AdaptedLinear
from rankfold.host.parameter_layer import AdaptedParameters
from rankfold.host.peft_api import in_out_features


def _features(base: nn.Module) -> tuple[int, int]:
    into, out = in_out_features(base)
    return int(into), int(out)  # pyright: ignore[reportArgumentType]


def _linear(base: nn.Module) -> bool:
    # Routers of experts that inherit from it (Llama 4, Phi-MoE) give several tensors, and an update can be added to none
    return isinstance(base, nn.Linear) and not type(base).__name__.endswith("Router")


def _conv1d(base: nn.Module) -> bool:
    return isinstance(base, Conv1D)


def _quantised_linear(base: nn.Module) -> bool:
    backend = resolve_quantization_backend(base, get_apply_tensor_subclass=lambda: None)
    return backend is not None and backend.layer_type == "linear"


def _convolution(base: nn.Module) -> bool:
    return isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _matrix(base: nn.Module) -> tuple[int, int]:
    """Of a convolution's weight, of which a kernel's positions count as inputs."""
    weight: Tensor = base.weight  # pyright: ignore[reportAssignmentType]
    return weight[0].numel(), len(weight)


def _embedding(base: nn.Module) -> bool:
    return isinstance(base, nn.Embedding)


def _table(base: nn.Module) -> tuple[int, int]:
    weight: Tensor = base.weight  # pyright: ignore[reportAssignmentType]
    return len(weight), weight.shape[1]


def _transposed(delta: Tensor, weight: Tensor) -> Tensor:
    return delta.T


def _transpose(weight: Tensor) -> Tensor:
    return weight.T


def _flat(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def _reshaped(delta: Tensor, weight: Tensor) -> Tensor:
    return delta.view_as(weight)


EMBEDDING_KEYS = ("lora_embedding_A", "lora_embedding_B")

#: The first that fits counts. Functions of this module and no lambdas: a model is pickled with the kinds of its layers.
KINDS = (
    Kind("linear", _linear, AdaptedLinear, _features),
    Kind("conv1d", _conv1d, AdaptedLinear, _features, _transposed, _transpose),
    Kind("quantised linear", _quantised_linear, AdaptedLinear, _features),
    Kind("convolution", _convolution, AdaptedConv, _matrix, _reshaped, _flat, linear=False),
    Kind("embedding", _embedding, AdaptedEmbedding, _table, _transposed, _transpose, EMBEDDING_KEYS, linear=False),
)


def _largest(base: nn.Module) -> tuple[int, int]:
    """(in, out) of the matrices of its own largest parameter; of experts as they are stored."""
    shapes = [p.shape[-2:] for p in base.parameters(recurse=False) if p.ndim in (2, 3)]
    out, into = max(shapes, key=min)
    return into, out


def _no_module(base: nn.Module) -> bool:
    return False


#: Of what `target_parameters` names: parameters of a module that is of no kind above.
EXPERTS = Kind("experts", _no_module, AdaptedParameters, _largest, linear=False)
PARAMETER = Kind("parameter", _no_module, AdaptedParameters, _largest, linear=False)


def kind_of(base: nn.Module) -> Kind | None:
    """The first row that fits a base module; None where nothing here adapts it."""
    return next((kind for kind in KINDS if kind.fits(base)), None)


def kind_named(name: str) -> Kind:
    """The row that a `Site.kind` names."""
    return next(kind for kind in (*KINDS, EXPERTS, PARAMETER) if kind.name == name)
