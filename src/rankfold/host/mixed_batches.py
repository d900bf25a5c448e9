"""Mixed batches: a call's `adapter_names`, one per row, on their way to every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from rankfold.host.layer import AdaptedLayer


@contextmanager
def passed_to_layers(model: Any, names: Sequence[str], beams: int) -> Iterator[None]:
    """Inside, every layer of the model is called with its rows' adapter names.

    Args:
        beams: of a beam search, which repeats every row, but only after an encoder has read it.
    """
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else model
    once = set() if encoder is model else set(encoder.modules())
    repeated = [n for n in names for _ in range(beams)]

    def pass_names(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {**kwargs, "adapter_names": names if module in once else repeated}

    hooks = [
        m.register_forward_pre_hook(pass_names, with_kwargs=True)
        for m in model.modules()
        if isinstance(m, (AdaptedLayer, AuxiliaryTrainingWrapper))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
