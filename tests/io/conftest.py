"""A cache of its own for every test that asks."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("RANKFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
