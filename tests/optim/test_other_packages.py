"""Trajectories beside other packages', where they are installed: pip install --no-deps pytorch-optimizer lora-pro-adamw."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from small_llama import adapted, train, trained

from rankfold.optim import LoraPro, LoraRite, lora_pro, pairs


def apart(ours: Any, theirs: Any) -> float:
    values = trained(theirs)
    return max(float((p - values[name]).abs().max()) for name, p in trained(ours).items())


@pytest.mark.parametrize(
    ("our_options", "their_options"),
    [
        ({}, {}),
        ({"clip": 0.05}, {"clip_unmagnified_grad": 0.05}),
        ({"weight_decay": 0.1}, {"weight_decay": 0.1}),
        ({"balance": True}, {"balance_param": True}),
        ({"escape": True}, {"apply_escape": True}),
    ],
    ids=str,
)
def test_lora_rite(our_options: dict[str, Any], their_options: dict[str, Any]) -> None:
    """pytorch_optimizer 4.1.0. With `cap` it keeps the capped moment, and so differs."""
    package = pytest.importorskip("pytorch_optimizer")
    ours, theirs = adapted().double(), adapted().double()
    alternating = [factor for p in pairs(theirs) for factor in (p.down, p.up)]
    reference = package.LoRARite(alternating, lr=0.01, update_skipping=0.0, **their_options)
    for group in reference.param_groups:
        group["eps_root"] = 0.0  # a second epsilon, under the root
    train(theirs, reference, range(8))
    train(ours, LoraRite(ours, lr=0.01, **{"escape": False, **our_options}), range(8))
    assert apart(ours, theirs) < 1e-12


def test_lora_pro_efficient(monkeypatch: pytest.MonkeyPatch) -> None:
    """lora-pro-adamw 0.2.1: its ridge is 1e-6, its moments are read in float32. Its full mode rounds the second one to bf16."""
    pytest.importorskip("lora_pro")
    package = importlib.import_module("lora_pro")
    monkeypatch.setattr(lora_pro, "DELTA", 1e-6)
    ours, theirs = adapted().double(), adapted().double()
    reference = package.LoRAProAdamW(
        theirs, lr=0.005, weight_decay=0.0, lorapro_mode="efficient", efficient_solver="eig"
    )
    train(theirs, reference, range(6))
    train(ours, LoraPro(ours, lr=0.005, mode="efficient"), range(6))
    assert apart(ours, theirs) < 5e-6
