"""Promises 1 to 4 for every method: the start, the paper's formula, merging and folding, the parameter count."""

from __future__ import annotations

import importlib
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHS, GPT2, LLAMA, MLP, T5, Arch, kinds, linear_shapes
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from table import (
    FIRST,
    LORA,
    RASA,
    ROWS,
    TABLE,
    WHOLE_GRID,
    Row,
    adapt,
    adapter_buffers,
    adapter_parameters,
    all_everywhere,
    assert_distinct,
    assert_same,
    everywhere,
    in_turn,
    layers,
    rows,
    snapshot,
    spread,
    state_at,
    stock_lora,
    weights,
)
from torch import nn

from rankfold import PlainLoraConfig, RasaConfig
from rankfold.host import registry
from rankfold.kernel.linears import separate_order


def test_every_method_is_in_the_table() -> None:
    assert {row.facts.method for row in ROWS} == set(registry.METHODS)


def cases(check: Any) -> set[tuple[str, Row]]:
    """The architectures' names and the rows that a test function meets together."""
    for mark in getattr(check, "pytestmark", ()):
        if mark.name == "parametrize" and {"arch", "row"} <= set(names := mark.args[0]):
            return {(case[names.index("arch")].name, case[names.index("row")]) for case in mark.args[1]}
    return set()


def test_every_two_of_check_method_and_architecture_meet() -> None:
    files = [importlib.import_module(path.stem) for path in Path(__file__).parent.glob("test_table*.py")]
    checks = [found for file in files for check in vars(file).values() if (found := cases(check))]
    met = {(arch, row.facts.method) for found in checks for arch, row in found}
    assert met >= set(product(ARCHS, registry.METHODS))
    widest = [found for found in checks if {row for _, row in found} >= set(ROWS)]
    assert len(widest) > 20
    for found in widest:
        archs = {arch for arch, _ in found}
        assert len(archs) > 1
        for facts in TABLE:
            assert len({arch for arch, row in found if row.facts is facts}) > 1


@pytest.mark.skipif(WHOLE_GRID, reason="rows take no turns: each meets every value")
@pytest.mark.parametrize("n", range(2, 19))
def test_rows_take_their_turns(n: int) -> None:
    """Whatever a check is called, each row has its turn, a method's first row has two, and every value comes up."""
    for check in ("test_a", "test_b", "test_c"):
        cases = in_turn(check, range(n))
        assert len(set(cases)) == len(cases) == len(ROWS) + len(FIRST)
        assert {row for _, row in cases} == set(ROWS)
        assert {value for value, _ in cases} == set(range(n))


# 1. The start -------------------------------------------------------------------------------------------------------


@everywhere
def test_starts_at_the_base(arch: Arch, row: Row, device: torch.device) -> None:
    if not row.facts.starts_at_base:
        pytest.skip("this method does not start at zero")
    base = arch.out(arch.build(device))
    model = adapt(arch, row, device, live=False)
    torch.testing.assert_close(arch.out(model), base, rtol=1e-6, atol=1e-6)
    assert all(layer.get_delta_weight("default").count_nonzero() == 0 for layer in layers(model).values())


# 2. The paper's formula -----------------------------------------------------------------------------------------------


@everywhere
def test_the_update_is_the_papers_formula(arch: Arch, row: Row, device: torch.device) -> None:
    if device.type == "mps":
        pytest.skip("no float64 on mps")
    model = adapt(arch, row, device).double()
    config = model.peft_config["default"]
    for name, layer in layers(model).items():
        adapter = layer.lowrank_adapters["default"]
        own, shared = state_at(model, name)
        wanted = row.facts.delta(config, config.rank_at(name), config.alpha_at(name), own, shared)
        factors = adapter.factors()
        assert factors.down.dtype == torch.float64
        torch.testing.assert_close(factors.delta(), wanted, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(sum(f.delta() for f in adapter.blocks()), wanted, rtol=1e-13, atol=1e-13)
        laid_out = wanted.T if layer.transposed else wanted
        torch.testing.assert_close(layer.get_delta_weight("default"), laid_out, rtol=1e-13, atol=1e-13)


@rows
def test_the_forward_adds_the_update(row: Row, device: torch.device) -> None:
    """Layer by layer, with and without the fused path, for inputs of 1 to 4 dimensions."""
    model = adapt(LLAMA, row, device)
    for layer in layers(model).values():
        inn = layer.get_base_layer().in_features
        delta = layer.get_delta_weight("default")
        for shape in ((inn,), (5, inn), (2, 5, inn), (2, 1, 3, inn), (0, inn)):
            x = torch.randn(shape, device=device)
            wanted = layer.base_layer(x) + x @ delta.T
            torch.testing.assert_close(layer(x), wanted)
            torch.testing.assert_close(layer.lowrank_adapters["default"](layer.base_layer(x), x), wanted)


@everywhere
def test_rank_of_the_update(arch: Arch, row: Row, device: torch.device) -> None:
    model = adapt(arch, row, device)
    config = model.peft_config["default"]
    shapes = linear_shapes(arch.build(), arch.targets)
    for names in kinds(list(shapes)).values():
        for name in names:
            factors = layers(model)[name].lowrank_adapters["default"].factors()
            layers_or_place = names.index(name) if row.facts.rank_by_place else len(names)
            assert factors.rank == row.facts.rank(config, config.rank_at(name), layers_or_place)
            rank = torch.linalg.matrix_rank(factors.to(torch.float64).delta()).item()
            assert rank == min(factors.rank, *shapes[name])


def det(shape: tuple[int, int], a: float, b: float, c: float) -> torch.Tensor:
    """The golden values' generator."""
    i, j = (torch.arange(n, dtype=torch.float64) for n in shape)
    return torch.sin(a + b * i[:, None] + c * j + 0.1 * i[:, None] * j)


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"lin": nn.Linear(5, 6)}) for _ in range(3))


def test_golden_rasa() -> None:
    model = get_peft_model(Three(), RasaConfig(r=4, shared_rank=2, lora_alpha=8, target_modules=["lin"])).double()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 156
    lora = get_peft_model(Three(), PlainLoraConfig(r=4, target_modules=["lin"]))
    assert sum(p.numel() for p in lora.parameters() if p.requires_grad) == 132
    found = list(layers(model).values())
    assert len(found) == 3
    x = torch.sin(torch.arange(1.0, 6.0, dtype=torch.float64))
    outputs, norms = [], []
    for i, layer in enumerate(found):
        adapter = layer.lowrank_adapters["default"]
        gate = torch.tensor([2, 2] + 6 * [2 / 3], dtype=torch.float64)
        torch.testing.assert_close(adapter.gate.float(), gate.float())
        with torch.no_grad():
            adapter.gate.copy_(gate)  # which was made in float32
            adapter.up.copy_(det((6, 2), 0.1 + i, 0.3, 0.7))
            adapter.down.copy_(det((2, 5), 0.2 + i, 0.5, 0.9))
            adapter.shared.up.copy_(det((6, 6), 1.3, 0.4, 1.1))
            adapter.shared.down.copy_(det((6, 5), 2.1, 0.8, 0.6))
            outputs.append((layer(x) - layer.base_layer(x)).sum().item())
        norms.append(adapter.factors().norm().item())
    assert outputs == pytest.approx([45.2122134539, 45.6722302148, 13.9115343466], abs=1e-9)
    assert norms == pytest.approx([14.4085746626, 15.3155436464, 11.1053138822], abs=1e-9)


def test_rasa_pool_reaches_every_layer_and_no_other_kind() -> None:
    row = next(r for r in ROWS if r.facts is RASA and r.variant == "k1")
    model = adapt(LLAMA, row)
    before = {n: layer.get_delta_weight("default") for n, layer in layers(model).items()}
    with torch.no_grad():
        layers(model)["model.layers.1.mlp.down_proj"].lowrank_adapters["default"].shared.up.add_(1.0)
    changed = {n for n, layer in layers(model).items() if not torch.equal(layer.get_delta_weight("default"), before[n])}
    assert changed == {n for n in before if n.endswith("down_proj")}


# 3. Merging and folding ---------------------------------------------------------------------------------------------


@everywhere
def test_forward_is_merged_is_folded(arch: Arch, row: Row, device: torch.device) -> None:
    model = adapt(arch, row, device)
    state, plain = snapshot(model), arch.out(arch.build(device))
    adapted = arch.out(model)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    torch.testing.assert_close(arch.out(stock_lora(model, arch)), adapted, rtol=1e-4, atol=1e-5)

    model.merge_adapter()
    assert all(layer.merged for layer in layers(model).values())
    torch.testing.assert_close(arch.out(model), adapted, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert_same(snapshot(model), state)
    assert torch.equal(arch.out(model), adapted)


@spread(dtype=[torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_restores_the_bits(row: Row, dtype: torch.dtype, device: torch.device) -> None:
    model = adapt(LLAMA, row, device, dtype=dtype)
    before = weights(model)
    for _ in range(2):
        model.merge_adapter(safe_merge=True)
        merged = weights(model)
        assert not any(torch.equal(merged[n], before[n]) for n in before)
        for n, layer in layers(model).items():  # rounded once, from a sum in float32
            wide = before[n].float() + layer.get_delta_weight("default").float()
            assert torch.equal(merged[n], wide.to(dtype))
        model.unmerge_adapter()
        assert_same(weights(model), before)


@rows
def test_folded_in_float64_is_exact(row: Row, device: torch.device) -> None:
    if device.type == "mps":
        pytest.skip("no float64 on mps")
    model = adapt(LLAMA, row, device, dtype=torch.float64).double()
    folded = stock_lora(model, LLAMA, dtype=torch.float64)
    torch.testing.assert_close(LLAMA.out(folded), LLAMA.out(model), rtol=1e-12, atol=1e-12)


# 4. Counting --------------------------------------------------------------------------------------------------------


@everywhere
def test_parameter_count(arch: Arch, row: Row, device: torch.device) -> None:
    model = adapt(arch, row, device)
    config = model.peft_config["default"]
    shapes = linear_shapes(arch.build(), arch.targets)
    wanted = row.facts.model_wide
    for names in kinds(list(shapes)).values():
        (shape,) = {shapes[n] for n in names}
        wanted += row.facts.count(config, config.rank_at(names[0]), *shape, len(names))
    assert sum(p.numel() for _, p in adapter_parameters(model)) == wanted
    base = arch.build()
    head = 0  # a copy of it is trained
    if arch.task == "SEQ_CLS":
        head = sum(p.numel() for name in arch.head for p in base.get_submodule(name).parameters())
    trainable, everything = model.get_nb_trainable_parameters()
    assert trainable == wanted + head
    assert everything == trainable + sum(p.numel() for p in base.parameters())


@all_everywhere
def test_every_tensor_lives_and_is_saved_once(arch: Arch, row: Row, device: torch.device) -> None:
    model = adapt(arch, row, device)
    named = list(model.named_parameters(remove_duplicate=False))
    ours = [p for n, p in named if "lowrank" in n]
    base = [p for n, p in named if "lowrank" not in n]
    assert_distinct(ours)
    assert not {id(p) for p in ours} & {id(p) for p in base}
    assert {id(p) for _, p in adapter_parameters(model)} == {id(p) for p in ours}
    assert_distinct([t for k, t in model.state_dict().items() if "lowrank" in k])

    saved = get_peft_model_state_dict(model)
    assert_distinct(list(saved.values()))
    numbers = sum(t.numel() for t in [*ours, *adapter_buffers(model).values()])
    assert sum(t.numel() for k, t in saved.items() if "lowrank" in k) == numbers
    assert not any("default" in key for key in saved)
    assert len({re.sub("modules_to_save.default.|default.", "", k) for k in model.state_dict()} & saved.keys()) == len(
        saved
    )

    optimizer = torch.optim.AdamW(model.parameters())
    held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    assert {id(p) for p in held} >= {id(p) for p in ours}
    assert not {id(p) for p in held} & {id(p) for p in base if not p.requires_grad}


@rows
def test_one_layer_of_a_kind_is_enough(row: Row, device: torch.device) -> None:
    model = adapt(MLP, row, device, target_modules=["head"], rank_pattern={}, alpha_pattern={})
    config = model.peft_config["default"]
    wanted = row.facts.count(config, config.r, 7, 12, 1) + row.facts.model_wide
    assert model.get_nb_trainable_parameters()[0] == wanted
    assert torch.isfinite(MLP.out(model)).all()


@pytest.mark.parametrize("arch", [LLAMA, GPT2, T5], ids=lambda arch: arch.name)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_plain_lora_is_pefts_bit_for_bit(arch: Arch, dropout: float, device: torch.device) -> None:
    """The yardstick: the same weights and seed give the same outputs and gradients as PEFT's own LoRA."""
    row = next(row for row in ROWS if row.facts is LORA)
    ours = adapt(arch, row, device, lora_dropout=dropout).train()
    config = LoraConfig(
        r=8,
        lora_alpha=8,
        lora_dropout=dropout,
        target_modules=list(arch.targets),
        task_type=arch.task,
        fan_in_fan_out=arch is GPT2,
    )
    theirs = get_peft_model(arch.build(device), config).train()
    pairs = []
    for name, layer in layers(ours).items():
        adapter, lora = layer.lowrank_adapters["default"], theirs.get_submodule(f"base_model.model.{name}")
        pairs += [(adapter.down, lora.lora_A["default"].weight), (adapter.up, lora.lora_B["default"].weight)]
    for p, q in pairs:
        q.data.copy_(p.data)
    losses = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        with separate_order():
            losses.append(arch.loss(model))
        losses[-1].backward()
    assert torch.equal(*losses)
    assert all(torch.equal(p.grad, q.grad) for p, q in pairs)
    if not dropout:  # the fused order rounds otherwise, and draws its masks as bytes
        torch.testing.assert_close(arch.loss(ours), losses[1], rtol=1e-5, atol=1e-6)
