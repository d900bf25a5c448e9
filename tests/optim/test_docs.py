"""The Python of the optimisers' pages runs as printed, and every option is on its page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from small_llama import adapted, train

from rankfold.optim.registry import OPTIMIZERS

PAGES = Path(__file__).parents[2] / "docs" / "optimisers"


def test_every_optimiser_has_a_page() -> None:
    assert {p.stem for p in PAGES.glob("*.md")} == set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_page(name: str) -> None:
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert OPTIMIZERS[name].paper in text
    for option in OPTIMIZERS[name].options():
        assert f"`{option.name}`" in text, option.name
    model = adapted()
    names = {"model": model, "torch": torch}
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(code, names)
    optimizer = names["optimizer"]
    assert isinstance(optimizer, torch.optim.Optimizer)
    train(model, optimizer, range(2))
