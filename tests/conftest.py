"""Fixtures every test may use: where to run, and small models of every architecture with random weights."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import Tensor


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """What is imported and collected stays: no round of the collector need go through it, and every run of a trainer asks for one."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def _devices() -> list[str]:
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return devices


@pytest.fixture(params=_devices())
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _loud(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that a test calls leave the libraries as they are: what `quiet` changes, it changes for the whole process."""
    monkeypatch.setattr("rankfold.commands.quiet.quiet", lambda: None)


@pytest.fixture
def pictures() -> None:
    """For tests that look at a run's pictures; elsewhere none are drawn, which takes a third of a small run's time."""


@pytest.fixture(autouse=True)
def _undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("rankfold.train.plot.save_figure", lambda *_: None)


@pytest.fixture
def masks_of_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer draws its own masks, as F.dropout does, so that they can be compared."""

    def bernoulli(x: Tensor, p: float) -> tuple[Tensor | None, float]:
        return (torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p) if p else None), 1 - p

    monkeypatch.setattr("rankfold.kernel.layout.drop_mask", bernoulli)
    monkeypatch.setattr("rankfold.host.siblings.Siblings.output", lambda *_: None)
    monkeypatch.setattr("rankfold.host.fused_mlp._members", lambda _: None)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test registers is forgotten after it."""
    from rankfold.host import registry

    monkeypatch.setattr(registry, "_ROWS", dict(registry.METHODS))
