"""Every method on a quantised base, through PEFT's quantisation backends, on a CPU: torchao; bitsandbytes if it is there."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import WIDE
from peft import PeftModel, get_peft_model
from table import Row, adapter_parameters, assert_same, first_rows, fit, layers, rows, second, stir
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao's own, at import
    from torchao.quantization import Int8WeightOnlyConfig


@dataclass(frozen=True)
class Backend:
    """A way to quantise.

    Args:
        config: for transformers.
        step: what a merged weight may be off by, in steps of 1/127 of its row's largest.
        rough: how far two forwards of one row may differ (bitsandbytes rounds the inputs too, to 8 bits).
    """

    package: str
    config: Callable[[], Any]
    step: float
    rough: float


TORCHAO = Backend("torchao", lambda: TorchAoConfig(Int8WeightOnlyConfig()), step=0.51, rough=1e-4)
BNB = Backend(
    "bitsandbytes",
    lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"]),
    step=1.1,
    rough=0.5,
)


class Quantised:
    """The quantised base, anew at every call."""

    def __init__(self, backend: Backend, folder: Path) -> None:
        self.backend, self.folder = backend, folder
        WIDE.build().save_pretrained(folder)

    def __call__(self) -> nn.Module:
        config = self.backend.config()
        model = AutoModelForCausalLM.from_pretrained(self.folder, quantization_config=config, dtype=torch.float32)
        return model.eval()


@pytest.fixture(scope="module", params=[TORCHAO, BNB], ids=lambda b: b.package)
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    if importlib.util.find_spec(request.param.package) is None:
        pytest.skip(f"{request.param.package} is not installed")
    return Quantised(request.param, tmp_path_factory.mktemp("base"))


def on(base: nn.Module, row: Row, *, live: bool = True) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = get_peft_model(base, row.config(WIDE))  # pyright: ignore[reportArgumentType]
    if live:
        stir(model)
    return model.eval()  # pyright: ignore[reportReturnType]


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.get_base_weight().clone() for name, layer in layers(model).items()}


@rows
def test_quantised_base(row: Row, quantised: Quantised, tmp_path) -> None:
    rough = quantised.backend.rough
    base = WIDE.out(quantised())
    model = on(quantised(), row, live=not row.facts.starts_at_base)
    assert all(layer.quantization_backend is not None for layer in layers(model).values())
    assert all("quantization_backend='" in repr(layer) for layer in layers(model).values())
    if row.facts.starts_at_base:
        assert torch.equal(WIDE.out(model), base)
    before = {n: p.detach().clone() for n, p in adapter_parameters(model)}
    fixed, first = base_weights(model), WIDE.loss(model).item()
    fit(WIDE, model, steps=4, lr=0.05)
    assert not any(torch.equal(p, before[n]) for n, p in adapter_parameters(model))
    assert_same(base_weights(model), fixed)
    assert WIDE.loss(model).item() < first
    for layer in layers(model).values():
        x = torch.randn(2, 3, layer.lowrank_adapters["default"].site.in_features)
        wanted = layer.base_layer(x) + x @ layer.get_delta_weight("default").T
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(WIDE.out(model), base)

    wanted = WIDE.out(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(WIDE.out(PeftModel.from_pretrained(quantised(), tmp_path)), wanted)
    second(model, WIDE, row)
    mixed = WIDE.out(model, adapter_names=["default", "__base__", "other"])
    for i, alone in enumerate((wanted, base)):
        torch.testing.assert_close(mixed[i], alone[i], rtol=rough, atol=rough)
    assert torch.equal(WIDE.out(model.unload()), base)


@rows
def test_merging_into_a_quantised_base(row: Row, quantised: Quantised) -> None:
    """Off by no more than what rounding to the base's own grid costs; unmerging costs as much again."""

    def step(w: Tensor) -> Tensor:
        return quantised.backend.step * w.abs().amax(1, keepdim=True) / 127

    model = on(quantised(), row)
    before = base_weights(model)
    types = {n: type(layer.base_layer.weight) for n, layer in layers(model).items()}
    exact = {n: before[n] + layer.get_delta_weight("default") for n, layer in layers(model).items()}
    model.merge_adapter(safe_merge=True)
    for n, merged in base_weights(model).items():
        assert ((merged - exact[n]).abs() <= step(exact[n]) + 1e-6).all()
        assert type(layers(model)[n].base_layer.weight) is types[n]
    assert torch.isfinite(WIDE.out(model)).all()
    model.unmerge_adapter()
    for n, weight in base_weights(model).items():
        assert ((weight - before[n]).abs() <= 1.02 * step(exact[n]) + step(before[n]) + 1e-6).all()
    merged = model.merge_and_unload()
    assert {n: type(merged.get_submodule(n).weight) for n in types} == types
    assert not any("lowrank" in k for k in merged.state_dict())


@first_rows
def test_broken_adapter_leaves_a_quantised_base_alone(row: Row, quantised: Quantised) -> None:
    model = on(quantised(), row)
    before = base_weights(model)
    with torch.no_grad():
        adapter_parameters(model)[-1][1].fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert_same(base_weights(model), before)


@first_rows
def test_all_linear_on_a_quantised_base(row: Row, quantised: Quantised) -> None:
    model = get_peft_model(quantised(), row.config(WIDE, target_modules="all-linear"))  # pyright: ignore[reportArgumentType]
    assert len(layers(model)) == 21
    assert torch.isfinite(WIDE.out(model.eval())).all()
