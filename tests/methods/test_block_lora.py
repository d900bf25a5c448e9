"""Block-LoRA: one block is LoRA, the arms stay equal, and what training then is; counts; blocks that do not divide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import LLAMA, linear_shapes
from peft import get_peft_model
from table import BLOCK_LORA, LORA, Row, adapt, assert_same, layers, snapshot
from test_table import det
from torch import nn

from rankfold import BlockLoraConfig, PlainLoraConfig
from rankfold.host.adapter import Site
from rankfold.methods.block_lora import BlockLora


def made(config: Any) -> tuple[Any, Any]:
    """One linear layer in float64, and its adapter."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 5)), config).double()
    (layer,) = layers(model).values()
    return layer, layer.lowrank_adapters["default"]


def trained(layer: Any, optimizer: torch.optim.Optimizer, steps: int = 30) -> None:
    x, target = det((16, 8), 0.5, 0.7, 1.3), det((16, 5), 0.9, 1.1, 0.4)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("axis", ["rank", "input"])
def test_one_block_is_lora_bit_for_bit(axis: str) -> None:
    row = Row(BLOCK_LORA, "one", {"r": 4, "blocks": 1, "block_axis": axis, "use_rslora": False})
    ours, lora = adapt(LLAMA, row), adapt(LLAMA, Row(LORA, "same", {"r": 4}))
    assert torch.equal(LLAMA.out(ours), LLAMA.out(lora))
    for model in (ours, lora):
        LLAMA.loss(model).backward()
    grads = [[p.grad for p in model.parameters() if p.grad is not None] for model in (ours, lora)]
    assert len(grads[0]) == len(grads[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_arms_stay_equal_and_train_as_one(name: str) -> None:
    """From zero, they are equal after any training, which is that of LoRA at rank r/n with B's rate times n."""
    n, lr = 4, 0.02

    def make(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=lr) if name == "sgd" else torch.optim.Adam(groups, lr=lr, eps=1e-30)

    layer, block = made(BlockLoraConfig(r=8, lora_alpha=8, blocks=n, use_rslora=False, target_modules=["0"]))
    other, lora = made(PlainLoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
    other.base_layer.load_state_dict(layer.base_layer.state_dict())
    lora.down.data.copy_(block.down)
    trained(layer, make(block.parameters()))
    trained(other, make([{"params": [lora.down]}, {"params": [lora.up], "lr": n * lr}]))
    arms = block.up.unflatten(1, (n, -1))
    assert arms.any()
    assert all(torch.equal(arms[:, i], arms[:, 0]) for i in range(n))
    grads = block.up.grad.unflatten(1, (n, -1))
    assert all(torch.equal(grads[:, i], grads[:, 0]) for i in range(n))
    torch.testing.assert_close(block.factors().delta(), lora.factors().delta(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(block.down, lora.down, rtol=1e-12, atol=1e-12)


def test_scale_is_that_of_the_whole_rank() -> None:
    assert made(BlockLoraConfig(r=4, lora_alpha=3, target_modules=["0"]))[1].scaling == 1.5  # α/√r
    assert made(BlockLoraConfig(r=4, lora_alpha=3, use_rslora=False, target_modules=["0"]))[1].scaling == 0.75


@pytest.mark.parametrize(("r", "n", "wanted"), [(2, 1, 184_320), (2, 2, 138_240), (4, 4, 230_400), (8, 8, 414_720)])
@pytest.mark.parametrize("axis", ["rank", "input"])
def test_parameters_of_clip_vit_b16(r: int, n: int, wanted: int, axis: str) -> None:
    """q, k, v of twelve layers of width 768 and twelve of width 512."""
    config = BlockLoraConfig(r=r, blocks=n, block_axis=axis)
    with torch.device("meta"):
        adapters = [BlockLora(config, Site("q", width, width)) for width in (768, 512)]
    assert 3 * 12 * sum(p.numel() for a in adapters for p in a.parameters()) == wanted


def test_blocks_that_do_not_divide_the_inputs() -> None:
    model = LLAMA.build()
    before = snapshot(model)
    inputs = {inn for _, inn in linear_shapes(model, LLAMA.targets).values()}
    assert all(inn % 5 for inn in inputs)
    config = Row(BLOCK_LORA, "bad", {}).config(LLAMA, blocks=5, block_axis="input")
    with pytest.raises(ValueError, match=r"blocks=5 must be a divisor of the \d+ inputs of model.layers.0"):
        get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    assert_same(snapshot(model), before)


def test_a_budget_asks_for_ranks_that_the_blocks_divide() -> None:
    config = BlockLoraConfig(r=8, blocks=4)
    assert [config.with_rank(n).r for n in (1, 4, 5, 9)] == [4, 4, 8, 12]
