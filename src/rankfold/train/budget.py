"""Exact parameter counts of an adapted model, and the memory that follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from rankfold.host.layer import AdaptedLayer
from rankfold.io.weights import read_headers


@dataclass(frozen=True)
class Budget:
    """Numbers of parameters; shared tensors count once.

    Args:
        base: frozen.
        adapter: trained in the adapter.
        head: trained in full beside it (`modules_to_save`).
        live: trained at a time, at most, where a method trains one part of the adapter after another; else None.
        base_bytes, trained_bytes: their memory as they are now.
    """

    base: int
    adapter: int
    head: int
    base_bytes: int
    trained_bytes: int
    live: int | None = None

    @property
    def trainable(self) -> int:
        return self.adapter + self.head

    def memory(self, state_bytes: int | None = None) -> dict[str, int]:
        """Bytes while training, without activations. `state_bytes` are the optimiser's; by default AdamW's two float32 states."""
        return {
            "frozen weights": self.base_bytes,
            "trained weights": self.trained_bytes,
            "gradients": self.trained_bytes,
            "optimiser": 8 * self.trainable if state_bytes is None else state_bytes,
        }


def count(model: nn.Module) -> Budget:
    """The budget of a PEFT model, by what requires a gradient."""
    base = adapter = head = base_bytes = trained_bytes = 0
    for name, p in model.named_parameters():
        size = p.numel() * p.element_size()
        if p.requires_grad:
            trained_bytes += size
            in_full = ".modules_to_save." in name
            head, adapter = (head + p.numel(), adapter) if in_full else (head, adapter + p.numel())
        else:
            base_bytes += size
            base += 0 if ".original_module." in name else p.numel()  # the head's untouched copy is not a second head
    return Budget(base, adapter, head, base_bytes, trained_bytes, live(model))


def live(model: nn.Module) -> int | None:
    """Parameters that are trained at a time, at most; None where that is all of them."""
    found = [a for m in model.modules() if isinstance(m, AdaptedLayer) for a in m.adapters(list(m.lowrank_adapters))]
    if not found:
        return None
    return found[0].config.live({a.site.name: sum(p.numel() for p in a.parameters() if p.requires_grad) for a in found})


def stored(adapter: Path) -> tuple[int, int]:
    """Parameters and bytes of a saved adapter."""
    file = adapter / "adapter_model.safetensors"
    return sum(math.prod(header.shape) for header in read_headers(file).values()), file.stat().st_size


def ranks(model: nn.Module) -> tuple[int | None, int | None]:
    """The ranks that are left and those at the start, of all modules together; None where no schedule chooses them."""
    layers = [m for m in model.modules() if isinstance(m, AdaptedLayer)]
    found = [a for layer in layers for a in layer.adapters(list(layer.lowrank_adapters)) if a.has_schedule]
    return (sum(a.alive() for a in found), sum(a.r for a in found)) if found else (None, None)
