"""XGBLoRA: its golden values, the draws of layers, what is trained, and how far the backward pass goes."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from models import LLAMA
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from table import adapter_parameters, layers
from test_chains import A0, ZERO_B, golden
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rankfold import PlainLoraConfig, XgbLoraConfig, attach
from rankfold.methods.xgblora import block_of


def adapted(seed: int = 1, targets: Any = ("q_proj", "down_proj"), **fields: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(LLAMA.build(), XgbLoraConfig(target_modules=list(targets), **fields)).train()  # pyright: ignore[reportArgumentType]


def started(model: nn.Module, steps: int | None = 12) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    return optimizer, attach(model, optimizer, total_steps=steps).controllers["default"]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = LLAMA.loss(model)
    loss.backward()
    optimizer.step()
    return loss.item()


def drawn(model: nn.Module) -> set[int]:
    return {int(name.split(".")[2]) for name, m in layers(model).items() if not m.lowrank_adapters["default"].resting}


def test_golden() -> None:
    config = XgbLoraConfig(lora_alpha=2, link_steps=2)
    found = golden(config, (A0[:1], ZERO_B[:, :1]), 0.02, links=4, steps=2)
    assert found == pytest.approx([8.7219582844, 8.1656781048, 7.9029159397, 7.7785552483], abs=1e-9)


def test_all_layers_and_one_booster_are_rank_1_lora_bit_for_bit() -> None:
    boosted = adapted(layers_drawn=3, link_steps=4)
    optimizer, _ = started(boosted, 4)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        plain: Any = get_peft_model(
            LLAMA.build(), PlainLoraConfig(r=1, lora_alpha=1, target_modules=["q_proj", "down_proj"])
        )  # pyright: ignore[reportArgumentType]
    other, _ = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.05), plain.train()
    for _ in range(4):
        assert step(boosted, optimizer) == step(plain, other)
    for (_, one), (_, two) in zip(adapter_parameters(boosted), adapter_parameters(plain), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.11.self_attn.q_proj", "model.layers.11"),
        ("decoder.block.3.layer.1.EncDecAttention.q", "decoder.block.3"),
        ("h.0.mlp.experts.7.w1", "h.0"),
        ("0.weight", "0"),
        ("mlp.2", "mlp.2"),
        ("head", "head"),
    ],
)
def test_block_of(name: str, block: str) -> None:
    assert block_of(name) == block


def test_each_booster_trains_the_layers_it_drew_and_no_others() -> None:
    model = adapted(layers_drawn=1, link_steps=2)
    optimizer, controller = started(model)
    seen, counts = [], [0, 0, 0]
    for booster in range(6):
        now = drawn(model)
        assert len(now) == 1
        seen.append(min(now))
        before = {n: t.clone() for n, t in model.state_dict().items()}
        for _ in range(2):
            step(model, optimizer)
        for name, p in model.state_dict().items():
            if "lowrank" in name and int(name.split(".")[4]) not in now:
                assert torch.equal(p, before[name])
        if booster < 5:  # a knot is not tied at the end of the run
            counts[seen[-1]] += 1
    assert len(set(seen)) > 1
    # R_l is the number of times that layer l was drawn
    assert [
        layers(model)[f"model.layers.{i}.mlp.down_proj"].lowrank_adapters["default"].frozen_rank for i in range(3)
    ] == counts
    assert [link["rank"] for link in controller.state["chain"]["links"]] == [2] * 5


def test_only_what_is_drawn_has_gradients_and_state() -> None:
    model = adapted(layers_drawn=1, link_steps=4)
    optimizer, _ = started(model)
    step(model, optimizer)
    (layer,) = drawn(model)
    for name, p in adapter_parameters(model):
        trained = int(name.split(".")[4]) == layer
        assert (p.grad is not None) == trained
        assert (p in optimizer.state) == trained


def test_the_backward_pass_stops_at_the_lowest_drawn_layer() -> None:
    """Counted in operations, which no other process on the machine can disturb."""
    found = {}
    for seed in range(20):
        model = adapted(layers_drawn=1, link_steps=4, seed=1)
        model.peft_config["default"].seed = seed
        started(model)
        (layer,) = drawn(model)
        if layer not in found:
            loss = LLAMA.loss(model)
            with FlopCounterMode(display=False) as counter:
                loss.backward()
            found[layer] = counter.get_total_flops()
        if len(found) == 3:
            break
    assert found[2] < found[1] < found[0]
    assert found[2] < 0.55 * found[0]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_no_gradient_flows_below_the_lowest_drawn_layer(checkpointed: bool) -> None:
    """Every gradient that reaches the output of a block is counted."""
    model = adapted(layers_drawn=1, link_steps=1000)
    if checkpointed:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        model.get_base_model().disable_input_require_grads()  # which transformers has asked for
    _, controller = started(model, None)
    arrived = [0, 0, 0]

    def watch(block: int) -> Any:
        def count(module: nn.Module, args: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            assert output.requires_grad == (block >= min(drawn(model)))
            if output.requires_grad:
                output.register_hook(lambda _: arrived.__setitem__(block, arrived[block] + 1))

        return count

    for i, block in enumerate(model.get_base_model().model.layers):
        block.register_forward_hook(watch(i))
    for seed in range(12):
        controller.config.seed = seed
        controller.begin()
        LLAMA.loss(model).backward()
        lowest = min(drawn(model))
        assert arrived == [int(block >= lowest) for block in range(3)]
        for name, p in adapter_parameters(model):
            assert (p.grad is not None) == (int(name.split(".")[4]) == lowest)
            p.grad = None
        arrived[:] = [0, 0, 0]


def test_copies_have_no_booster() -> None:
    """A copy is not attached, so each of its layers trains until it is."""
    model = adapted(layers_drawn=1)
    started(model)
    assert len(drawn(model)) == 1
    assert drawn(copy.deepcopy(model)) == {0, 1, 2}


def test_draws_are_the_same_in_every_process_and_after_a_resume() -> None:
    model = adapted(layers_drawn=1, link_steps=2, lora_dropout=0.0)
    optimizer, _ = started(model)
    draws, files = [], []
    for _ in range(12):
        draws.append(drawn(model))
        buffer = io.BytesIO()
        torch.save({"adapter": get_peft_model_state_dict(model), "optimizer": optimizer.state_dict()}, buffer)
        files.append(buffer.getvalue())
        step(model, optimizer)
    for at in (1, 2, 5, 6):
        again = adapted(seed=99, layers_drawn=1, link_steps=2)
        file = torch.load(io.BytesIO(files[at]), weights_only=True)
        set_peft_model_state_dict(again, file["adapter"])
        optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=0.05)
        optimizer.load_state_dict(file["optimizer"])
        attach(again, optimizer, total_steps=12)
        for later in range(at, 12):
            assert drawn(again) == draws[later]
            step(again, optimizer)
        wanted = model.state_dict()
        assert all(torch.equal(t, wanted[k]) for k, t in again.state_dict().items())


def test_detaching_gives_every_layer_back() -> None:
    model = adapted(layers_drawn=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    attached = attach(model, optimizer, total_steps=12)
    assert len(drawn(model)) == 1
    attached.remove()
    assert drawn(model) == {0, 1, 2}


def test_a_pair_that_is_not_drawn_still_counts() -> None:
    """A second run goes on from the last booster of the first, whatever it draws."""
    model = adapted(layers_drawn=1, init_lora_weights=False)
    wanted = LLAMA.out(model)
    started(model)
    torch.testing.assert_close(LLAMA.out(model), wanted)


def test_a_pair_that_is_not_drawn_is_turned_up_with_the_others() -> None:
    model = adapted(layers_drawn=3, init_lora_weights=False)
    for layer in layers(model).values():
        layer.set_scale("default", 3.0)
    wanted = LLAMA.out(model)
    for layer in layers(model).values():
        layer.lowrank_adapters["default"].resting = True
    torch.testing.assert_close(LLAMA.out(model), wanted)


def test_bad_draws() -> None:
    with pytest.raises(ValueError, match=r"layers_drawn=4 exceeds the 3 layers .*choose layers_drawn <= 3"):
        started(adapted(layers_drawn=4))
    with pytest.warns(UserWarning, match="boosters of one step train b alone"):
        started(adapted(layers_drawn=3, link_steps=1))
    model = adapted(layers_drawn=1, link_steps=2)
    optimizer, _ = started(model)
    other = next(p for n, p in adapter_parameters(model) if int(n.split(".")[4]) not in drawn(model))
    other.grad = torch.zeros_like(other)
    with pytest.raises(
        ValueError, match=r"has a gradient, and the live booster does not train it; load the optimiser's state"
    ):
        optimizer.step()


def test_a_third_of_the_layers_by_default() -> None:
    model = adapted()
    _, controller = started(model)
    assert controller.count == 1


def test_the_rank_grows_by_one_per_booster_and_the_loss_falls() -> None:
    """On a quadratic that no low-rank update solves: min(T, out, in) directions after T boosters."""
    torch.manual_seed(0)
    target = torch.randn(8, 6, dtype=torch.float64)
    config = XgbLoraConfig(link_steps=20, target_modules=["0"], links_limit=100)
    model: Any = get_peft_model(nn.Sequential(nn.Linear(6, 8, bias=False)).double(), config).double()  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    attach(model, optimizer)
    layer = model.base_model.model[0]
    (adapter,) = layer.lowrank_adapters.values()
    losses: list[float] = []

    def loss() -> Tensor:
        return 0.5 * (model(torch.eye(6, dtype=torch.float64)).T - target).square().sum()

    for booster in range(1, 10):
        for _ in range(20):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        losses.append(loss().item())
        assert torch.linalg.matrix_rank(adapter.factors().delta()) == min(booster, 6)
    assert losses == sorted(losses, reverse=True)
