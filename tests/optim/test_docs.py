"""Every optimiser has its page, and every option is on it; tests/docs/ runs their Python."""

from __future__ import annotations

from pathlib import Path

import pytest

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
