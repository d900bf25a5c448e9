"""SBoRA: golden values, columns and rows trained directly, regions, index sets in files, what is multiplied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import LLAMA
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from table import ROWS, Row, adapt, assert_same, layers, snapshot, weights
from test_table import det
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rankfold import PlainLoraConfig, SboraConfig
from rankfold.host.adapter import Site
from rankfold.methods.sbora import Sbora

FA, FB = (row for row in ROWS if row.facts.method == "sbora")
both = pytest.mark.parametrize("row", [FA, FB], ids=str)


def one_layer(config: Any, out: int = 5, inn: int = 7) -> tuple[nn.Module, Any, Sbora]:
    """A model of one linear layer, the layer, and its adapter, in float64."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(inn, out)), config).double()
    (layer,) = layers(model).values()
    return model, layer, layer.lowrank_adapters["default"]


@pytest.mark.parametrize(
    ("variant", "index", "trained", "wanted"),
    [
        ("fa", (4, 0, 5), det((5, 3), 0.3, 0.5, 0.7), 13.5418780888),
        ("fb", (3, 1, 0), det((3, 7), 0.6, 0.2, 0.8), 9.2092546058),
    ],
)
def test_golden(variant: str, index: tuple[int, ...], trained: Tensor, wanted: float) -> None:
    _, layer, adapter = one_layer(SboraConfig(r=3, lora_alpha=6, variant=variant, target_modules=["0"]))
    adapter.index.copy_(torch.tensor(index))
    next(adapter.parameters()).data.copy_(trained)
    x = det((2, 7), 0.2, 0.9, 0.4)
    assert (layer(x) - layer.base_layer(x)).sum().item() == pytest.approx(wanted, abs=1e-9)


@both
def test_one_step_changes_r_columns_or_rows_and_nothing_else(row: Row) -> None:
    """After a step of training, merged: every other entry of every weight has its bits."""
    model = adapt(LLAMA, row, live=False, lora_dropout=0.0).train()
    before = weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    LLAMA.loss(model).backward()
    optimizer.step()
    model.merge_adapter()
    for name, layer in layers(model).items():
        adapter = layer.lowrank_adapters["default"]
        merged, old = layer.get_base_weight(), before[name]
        if row is FB:
            merged, old = merged.T, old.T
        changed = torch.zeros(merged.shape[1], dtype=torch.bool)
        changed[adapter.index] = True
        assert changed.sum() == adapter.r
        assert torch.equal(merged[:, ~changed].view(torch.int32), old[:, ~changed].view(torch.int32))
        assert (merged[:, changed] != old[:, changed]).any(0).all()
    model.unmerge_adapter()
    assert_same(weights(model), before)


@pytest.mark.parametrize("variant", ["fa", "fb"])
@pytest.mark.parametrize(
    ("make", "power"),
    [
        (lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9), 2),
        (lambda params, lr: torch.optim.Adam(params, lr=lr, eps=1e-30), 1),
    ],
    ids=["sgd", "adam"],
)
def test_it_trains_the_columns_themselves(variant: str, make: Callable, power: int) -> None:
    """SGD at lr equals SGD on the columns of W at s²·lr, and Adam at s·lr (epsilon 0)."""
    s, lr = 1.5, 0.01
    _, layer, adapter = one_layer(SboraConfig(r=2, lora_alpha=3, variant=variant, target_modules=["0"]))
    base = layer.get_base_layer()
    direct = base.weight.detach().clone().requires_grad_()
    mask = torch.zeros_like(direct)
    mask[(slice(None), adapter.index) if variant == "fa" else adapter.index] = 1.0
    x, target = det((16, 7), 0.5, 0.7, 1.3), det((16, 5), 0.9, 1.1, 0.4)
    ours, theirs = make(adapter.parameters(), lr), make([direct], lr * s**power)
    for _ in range(20):
        ours.zero_grad()
        (layer(x) - target).square().mean().backward()
        ours.step()
        theirs.zero_grad()
        (nn.functional.linear(x, direct, base.bias) - target).square().mean().backward()
        assert direct.grad is not None
        direct.grad *= mask
        theirs.step()
    torch.testing.assert_close(layer.merged_weight(["default"]), direct.detach(), rtol=1e-12, atol=1e-12)


@both
def test_three_of_six_products_are_left(row: Row) -> None:
    """Forward, gradient of the factor, gradient of the input: LoRA multiplies by two factors in each, SBoRA by one."""

    def addmm_(y: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
        return 2 * a[0] * a[1] * b[1]

    def products(config: Any) -> int:
        _, layer, adapter = one_layer(config, out=20, inn=24)
        nn.init.ones_(next(adapter.parameters()))
        x = torch.randn(40, 24, dtype=torch.float64, requires_grad=True)
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_}) as counter:
            layer(x).sum().backward()
        return counter.get_total_flops() - 4 * 40 * 20 * 24

    plain = products(PlainLoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    found = products(SboraConfig(r=3, variant=row.kwargs.get("variant", "fa"), target_modules=["0"]))
    assert plain == 6 * 40 * 3 * (20 + 24)
    assert found == 6 * 40 * 3 * (20 if row is FA else 24)


# Index sets ---------------------------------------------------------------------------------------------------------


@both
def test_index_sets(row: Row, tmp_path: Path) -> None:
    """Distinct, in range, the same for one seed, others for another; kept by files, casts and a config with another seed."""
    model = adapt(LLAMA, row)
    found = {n: layer.lowrank_adapters["default"].index.clone() for n, layer in layers(model).items()}
    for name, index in found.items():
        n = layers(model)[name].in_features if row is FA else layers(model)[name].out_features
        assert len(set(index.tolist())) == len(index)
        assert index.min() >= 0
        assert index.max() < n
    assert len({tuple(i.tolist()) for i in found.values()}) > 1  # each module draws for itself
    again = {n: layer.lowrank_adapters["default"].index for n, layer in layers(adapt(LLAMA, row, seed=9)).items()}
    assert_same(again, found)
    model.half()
    assert_same({n: layer.lowrank_adapters["default"].index for n, layer in layers(model).items()}, found)
    model.save_pretrained(tmp_path)
    config = row.config(LLAMA, seed=99)
    loaded = PeftModel.from_pretrained(LLAMA.build(), tmp_path, config=config)
    assert_same({n: layer.lowrank_adapters["default"].index for n, layer in layers(loaded).items()}, found)


def test_draws_that_are_written_down() -> None:
    """The draw may never change: an adapter that is trained again from its run file must get the same columns."""
    site = Site("model.layers.0.self_attn.q_proj", 16, 16)
    assert SboraConfig(r=4).index_at(site) == WRITTEN
    assert SboraConfig(r=2, region=1).index_at(site) == WRITTEN[2:]
    assert SboraConfig(r=2, region=1, draw="first").index_at(site) == [2, 3]
    assert SboraConfig(r=4, seed=1).index_at(site) != WRITTEN


WRITTEN = [9, 4, 3, 2]


@both
def test_regions_do_not_disturb_each_other(row: Row) -> None:
    """Two regions: A₁A₂ᵀ = 0 (B₁ᵀB₂ = 0), and their merged sum is both applied, in any order."""
    model = adapt(LLAMA, row, lora_dropout=0.0).double()
    model.add_adapter("other", row.config(LLAMA, lora_dropout=0.0, region=1))
    for layer in layers(model).values():
        one, two = (layer.lowrank_adapters[n] for n in ("default", "other"))
        assert not set(one.index.tolist()) & set(two.index.tolist())
        nn.init.normal_(next(two.parameters()))
        first, second = (a.factors().to(torch.float64) for a in (one, two))
        cross = first.down @ second.down.T if row is FA else first.up.T @ second.up
        assert not cross.any()
    model = model.double()
    model.base_model.set_adapter(["default", "other"])
    wanted = LLAMA.out(model)
    merged = []
    for order in (["default", "other"], ["other", "default"]):
        model.merge_adapter(order)
        torch.testing.assert_close(LLAMA.out(model), wanted, rtol=1e-10, atol=1e-10)
        merged.append(weights(model))
        model.unmerge_adapter()
    assert_same(*merged)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"r": 17},
            r"SboraConfig: r=17 with region=0 exceeds model.layers.0.self_attn.q_proj, whose weight has 16 columns",
        ),
        ({"r": 4, "region": 4}, r"r=4 with region=4 exceeds .*choose r \* \(region \+ 1\) <= 16"),
        ({"r": 9, "region": 1, "variant": "fb"}, r"exceeds .* 16 rows"),
    ],
)
def test_regions_that_do_not_fit(changes: dict[str, Any], said: str) -> None:
    model = LLAMA.build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=said):
        get_peft_model(model, FA.config(LLAMA, **changes))  # pyright: ignore[reportArgumentType]
    assert_same(snapshot(model), before)


@both
@pytest.mark.parametrize("broken", [[0, 1, 1], [0, 1, 99], [-1, 0, 1]], ids=["repeats", "too large", "negative"])
def test_index_sets_of_a_file_that_do_not_fit(row: Row, broken: list[int]) -> None:
    model = adapt(LLAMA, row, r=3)
    state = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    key = max(k for k in state if k.endswith("index"))
    state[key] = torch.tensor(broken)
    for t in state.values():
        if t.is_floating_point():
            t.fill_(7.0)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"index set at .* repeats an index or leaves 0 to"):
        set_peft_model_state_dict(model, state)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize(
    ("model", "types", "fa", "fb"),
    [
        ("llama-7b", "q k v up down", 28_049_408, 28_049_408),
        ("llama3-8b", "q k v up down", 25_165_824, 31_457_280),
        ("llama-7b", "q k v o gate up down", 43_515_904, 36_438_016),
        ("llama3-8b", "q k v o gate up down", 44_040_192, 39_845_888),
    ],
)
def test_parameters_of_the_readmes_models(model: str, types: str, fa: int, fb: int) -> None:
    """At r = 32; with all seven types, QSBoRA's."""
    h, kv, mlp = {"llama3-8b": (4096, 1024, 14336), "llama-7b": (4096, 4096, 11008)}[model]
    shapes = {"q": (h, h), "k": (kv, h), "v": (kv, h), "o": (h, h), "gate": (mlp, h), "up": (mlp, h), "down": (h, mlp)}
    for variant, wanted in (("fa", fa), ("fb", fb)):
        config, sites = SboraConfig(r=32, variant=variant), [Site(t, *shapes[t][::-1]) for t in types.split()]
        with torch.device("meta"):
            assert 32 * sum(p.numel() for s in sites for p in Sbora(config, s).parameters()) == wanted
