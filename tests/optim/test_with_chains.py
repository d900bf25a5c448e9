"""Pair optimisers on methods that tie knots: what a link leaves behind, resuming from every step, frozen factors, loss scaling."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from small_llama import TARGETS, adapted, batch, train, trained
from torch import nn

from rankfold import AdaSvdConfig, ColaConfig, DeltaLoraConfig, XgbLoraConfig, attach
from rankfold.optim import LoraFa, LoraPlus, pairs
from rankfold.optim.create import create
from rankfold.optim.registry import OPTIMIZERS

STEPS = 6
CHAINS: dict[str, Callable[[], Any]] = {
    "cola": lambda: ColaConfig(r=4, links=3, link_ranks=[4, 2, 1], rewarm_steps=1, restart_schedule="linear", target_modules=TARGETS),
    "xgblora": lambda: XgbLoraConfig(r=2, link_steps=2, layers_drawn=1, target_modules=TARGETS),
    "delta_lora": lambda: DeltaLoraConfig(r=4, start_step=1, target_modules=TARGETS),
}  # fmt: skip
chains = pytest.mark.parametrize("chain", CHAINS)


@chains
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumes_bit_for_bit_inside_a_link_and_at_a_knot(name: str, chain: str) -> None:
    def start(seed: int) -> tuple[Any, torch.optim.Optimizer]:
        model = adapted(CHAINS[chain](), seed=seed)
        return model, create(name, model, 0.003)

    model, optimizer = start(1)
    attach(model, optimizer, total_steps=STEPS)
    files = []
    for step in range(STEPS):
        file = io.BytesIO()
        torch.save({"adapter": get_peft_model_state_dict(model), "optimizer": optimizer.state_dict()}, file)
        files.append(file.getvalue())
        train(model, optimizer, range(step, step + 1))
    wanted = model.state_dict()
    for at in (1, 2, 4):
        file = torch.load(io.BytesIO(files[at]), weights_only=True)
        again, resumed = start(9)
        set_peft_model_state_dict(again, file["adapter"])
        resumed.load_state_dict(file["optimizer"])
        attach(again, resumed, total_steps=STEPS)
        train(again, resumed, range(at, STEPS))
        assert again.state_dict().keys() == wanted.keys()
        assert all(torch.equal(t, wanted[key]) for key, t in again.state_dict().items()), at


@chains
def test_what_lora_fa_froze_stays_frozen(chain: str) -> None:
    """Also where knots give it new values, and after PEFT has asked the whole adapter for gradients again."""
    model = adapted(CHAINS[chain]())
    optimizer = LoraFa(model, lr=0.003)
    attach(model, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        if step == 3:
            with model.disable_adapter():
                model(input_ids=batch(0))
        train(model, optimizer, range(step, step + 1))
        assert not any(p.down.requires_grad or p.down.grad is not None for p in optimizer.pairs)


def test_an_optimiser_made_in_mid_chain_holds_every_layer() -> None:
    """As a second Trainer's is, when the first was interrupted."""
    model = adapted(CHAINS["xgblora"]())
    first = create("lora_rite", model, 0.003)
    attach(model, first, total_steps=STEPS)
    train(model, first, range(1))
    assert len(pairs(model)) == 6
    for duplicate in (copy.deepcopy(model), model):
        second = create("lora_rite", duplicate, 0.003)
        second.load_state_dict(first.state_dict())
        controller: Any = attach(duplicate, second, total_steps=STEPS).controllers["default"]
        assert len(controller.adapters) == 6
        assert len(controller.trained()) == 3
        assert controller.step == 1


@chains
@pytest.mark.parametrize("name", ["lora_rite", "lora_fa"])
def test_a_step_that_the_scaler_skips_is_none(name: str, chain: str) -> None:
    def run(scaled: bool) -> nn.Module:
        model = adapted(CHAINS[chain]())
        optimizer = create(name, model, 0.003)
        attached = attach(model, optimizer, total_steps=STEPS)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000, enabled=scaled)
        for step in (0, 1, 1, 2, 3, 4, 5) if scaled else range(STEPS):
            optimizer.zero_grad()
            loss: Any = scaler.scale(model(input_ids=batch(step), labels=batch(step)).loss)
            loss.backward()
            if scaled and step == 1 and attached.controllers["default"].step == 1 and scaler.get_scale() == 2.0**10:
                gradient = next(p.up.grad for p in pairs(model, frozen_down=True) if p.up.grad is not None)
                gradient[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        assert attached.controllers["default"].step == STEPS
        return model

    one, other = trained(run(True)), trained(run(False))
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=0, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


def test_lora_plus_trains_a_method_with_a_penalty() -> None:
    """Its step reads no factor off the other, so AdaLoRA's schedule runs as under AdamW; the gates learn at the plain rate."""
    model = adapted(AdaSvdConfig(r=4, target_r=2, tinit=1, tfinal=1, deltaT=1, target_modules=TARGETS))
    optimizer = LoraPlus(model, lr=0.003)
    attached = attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, range(STEPS))
    assert attached.controllers["default"].finished()
    assert sum(attached.ranks()["default"].values()) == 2 * 6
    assert {g["kind"] for g in optimizer.param_groups} == {"down", "up", "plain vectors"}
