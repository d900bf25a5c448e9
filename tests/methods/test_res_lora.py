"""ResLoRA: golden values, what the shortcuts are and what flows through them, and where they cannot run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from table import layers
from test_table import det
from torch import Tensor, nn

from rankfold import ResLoraConfig


class Stack(nn.Module):
    """Linear layers of one type, each on an input of its own."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"lin": nn.Linear(i, o, bias=False)}) for o, i in shapes)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [layer["lin"](x) for layer, x in zip(self.layers, xs, strict=True)]


def golden(shortcut: str, previous: int = 1) -> tuple[Any, list[Tensor]]:
    """G6's modules 0 to 3, and their inputs."""
    config = ResLoraConfig(r=2, lora_alpha=4, shortcut=shortcut, previous=previous, target_modules=["lin"])
    model: Any = get_peft_model(Stack([(6, 6)] * 4), config).double()  # pyright: ignore[reportArgumentType]
    for i, layer in enumerate(layers(model).values()):
        pair = layer.lowrank_adapters["default"].pair
        with torch.no_grad():
            pair.down.copy_(det((2, 6), 0.2 + i, 0.5, 0.3))
            pair.up.copy_(det((6, 2), 0.8 + i, 0.4, 0.6))
            layer.get_base_weight().copy_(det((6, 6), 0.1 * i, 0.9, 1.3))
    return model, [det((3, 6), 0.7 + i, 1.1, 0.2) for i in range(4)]


@pytest.mark.parametrize(
    ("shortcut", "previous", "wanted"),
    [("bs", 2, -29.6280360474), ("is", 1, -111.5268501377), ("ms", 2, -32.2907178150)],
)
def test_golden(shortcut: str, previous: int, wanted: float) -> None:
    model, xs = golden(shortcut, previous)
    found = model(xs)[3] - xs[3] @ list(layers(model).values())[3].get_base_weight().T
    assert found.sum().item() == pytest.approx(wanted, abs=1e-9)
