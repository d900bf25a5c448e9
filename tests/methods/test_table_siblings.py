"""Promises 3, 5, 6 and 7 where layers that read one input are computed together (siblings.py): every method, every such model; with
torch's products and with oneDNN's, which models of this size would not meet (products.py)."""

from __future__ import annotations

import copy

import pytest
import torch
from models import BERT, LLAMA, T5, VIT, Arch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from table import (
    DROPPING,
    FIRST,
    Row,
    adapt,
    adapter_parameters,
    assert_same,
    fit,
    layers,
    second,
    snapshot,
    spread,
    stock_lora,
)
from torch import Tensor

from rankfold.host.fused_mlp import FusedMlp, unfuse_mlps
from rankfold.kernel import matmul as products

#: Of each architecture every module that has siblings, and one that has none; patterns of the rows mean the first two.
TARGETS = {
    "llama": ["q_proj", "down_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
    "bert": ["query", "output.dense", "key", "value"],
    "t5": ["q", "wo", "k", "v"],
    "vit": ["q_proj", "fc2", "k_proj", "v_proj"],
}
WITH_SIBLINGS = {"llama": 3 * 5, "bert": 3 * 3, "t5": 4 * 3, "vit": 3 * 3}


PRODUCTS = ["torch", "onednn"]


@pytest.fixture(autouse=True)
def _multiplied_by(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`product` is a parameter of every test here."""
    onednn = product == "onednn"
    if onednn and not products._has_onednn():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "_mkl_holds_back", lambda: onednn)
    monkeypatch.setattr(products, "WORTH", 1)
    monkeypatch.setattr(products, "WIDE", 2)


def wide(arch: Arch, row: Row, device: torch.device, **changes: object) -> PeftModel:
    return adapt(arch, row, device, **{"target_modules": TARGETS[arch.name], **changes})  # pyright: ignore[reportArgumentType]


def alone(model: PeftModel) -> PeftModel:
    model = copy.deepcopy(model)
    for layer in layers(model).values():
        layer.siblings = None
    unfuse_mlps(model)
    return model


def gradients(arch: Arch, model: PeftModel) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model.zero_grad()
    arch.loss(model).backward()
    return {n: p.grad.clone() for n, p in adapter_parameters(model) if p.grad is not None}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= 2e-4 * b[name].norm() + 1e-6, name


@spread(arch=[LLAMA, BERT, T5, VIT], product=PRODUCTS)
def test_together_is_alone_is_merged_is_folded(arch: Arch, row: Row, device: torch.device) -> None:
    model = wide(arch, row, device)
    assert sum(layer.siblings is not None for layer in layers(model).values()) == WITH_SIBLINGS[arch.name]
    assert sum(isinstance(m, FusedMlp) for m in model.modules()) == (3 if arch.name == "llama" else 0)
    out = arch.out(model)
    torch.testing.assert_close(arch.out(alone(model)), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(arch.out(stock_lora(model, arch)), out, rtol=1e-4, atol=1e-4)
    assert_close(gradients(arch, model), gradients(arch, alone(model)))
    model.merge_adapter()
    torch.testing.assert_close(arch.out(model), out, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(arch.out(model), out)


@spread(FIRST, product=PRODUCTS)
def test_two_adapters_switched_disabled_and_deleted(row: Row, device: torch.device) -> None:
    model = wide(LLAMA, row, device)
    first = LLAMA.out(model)
    second(model, LLAMA, row, target_modules=["q_proj", "gate_proj"])  # its siblings lack it
    model.set_adapter("other")
    torch.testing.assert_close(LLAMA.out(model), LLAMA.out(alone(model)), rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(LLAMA.out(model), LLAMA.out(LLAMA.build(device)), rtol=1e-5, atol=1e-6)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(LLAMA.out(model), first)


@spread(FIRST, product=PRODUCTS)
def test_saved_and_loaded(row: Row, device: torch.device) -> None:
    model, other = wide(LLAMA, row, device), wide(LLAMA, row, device, seed=9)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert torch.equal(LLAMA.out(other), LLAMA.out(model))


@spread(DROPPING, reentrant=[False, True], product=PRODUCTS)
def test_checkpointing_draws_the_shared_masks_again(row: Row, reentrant: bool, device: torch.device) -> None:
    model = wide(LLAMA, row, device, lora_dropout=0.3).train()
    plain = gradients(LLAMA, model)
    base = model.get_base_model()
    base.enable_input_require_grads()  # pyright: ignore[reportCallIssue]
    base.activation_checkpointing_enable({"use_reentrant": reentrant})  # pyright: ignore[reportCallIssue]
    assert_close(gradients(LLAMA, model), plain)


@spread(DROPPING, product=PRODUCTS)
def test_training_repeats_to_the_bit(row: Row, device: torch.device) -> None:
    """Shared masks come from torch's generator, so a run that resumes it draws the same ones."""
    ends = []
    for _ in range(2):
        model = wide(LLAMA, row, device, live=False, lora_dropout=0.3).train()
        torch.manual_seed(0)
        fit(LLAMA, model, steps=4)
        ends.append(snapshot(model))
    assert_same(*ends)


@spread(FIRST, dtype=[torch.bfloat16, torch.float64], product=PRODUCTS)
def test_precision(row: Row, dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "mps" and dtype == torch.float64:
        pytest.skip("no float64 on mps")
    model = wide(LLAMA, row, device, dtype=dtype)
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(LLAMA.out(model), LLAMA.out(alone(model)), rtol=tolerance, atol=tolerance)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        torch.testing.assert_close(LLAMA.out(model), LLAMA.out(alone(model)), rtol=0.1, atol=0.1)
