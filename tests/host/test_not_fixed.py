"""An adapter whose update depends on the input: it trains, switches and saves, and whatever needs a matrix says why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from rankfold import PlainLoraConfig
from rankfold.errors import RankfoldError
from rankfold.fold import fold_adapter, fold_model
from rankfold.host.registry import Method, register
from rankfold.inspect import inspect_adapter
from rankfold.methods.lora import Lora
from rankfold.plan.cost import cost

pytestmark = pytest.mark.usefixtures("own_registry")
SENTENCE = r": its update depends on the input, so no matrix and no LoRA equals it; serve it with PEFT, unmerged$"


class SquareConfig(PlainLoraConfig):
    method: ClassVar[str] = "square"
    fixed: ClassVar[bool] = False  # pyright: ignore[reportIncompatibleMethodOverride]


class Square(Lora):
    """B·(A·x)²: zero at first, and not linear in x."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return y + self.scaling * (x @ self.down.T).square() @ self.up.T


@pytest.fixture
def model(own_registry: None) -> PeftModel:
    register(Method("square", "Square", "none", "", SquareConfig, Square))
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=30
    )
    given: Any = SquareConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(config), given)  # pyright: ignore[reportReturnType]


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(6)[None]).logits


def test_it_trains_and_saves(model: PeftModel, tmp_path: Path) -> None:
    model(torch.arange(6)[None]).logits.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    before = output(model)
    with model.disable_adapter():
        assert not torch.allclose(before, output(model))
    model.save_pretrained(str(tmp_path))
    base: Any = model.unload()
    assert torch.equal(output(PeftModel.from_pretrained(base, str(tmp_path))), before)


ASK: dict[str, Callable[[PeftModel], object]] = {
    "merge": lambda m: m.merge_adapter(),
    "safe merge": lambda m: m.merge_adapter(safe_merge=True),
    "merge and unload": lambda m: m.merge_and_unload(),  # pyright: ignore[reportCallIssue]
    "delta": lambda m: m.base_model.model.model.layers[0].self_attn.q_proj.get_delta_weight("default"),  # pyright: ignore
    "inspect": inspect_adapter,
}


@pytest.mark.parametrize("what", ASK)
def test_what_needs_a_matrix_says_why_and_changes_nothing(what: str, model: PeftModel) -> None:
    before = output(model)
    with pytest.raises(RankfoldError, match=f"^Square at model.layers.0.self_attn.q_proj{SENTENCE}"):
        ASK[what](model)
    assert torch.equal(output(model), before)


def test_folding_and_inspecting_a_folder(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(str(tmp_path / "adapter"))
    model.config.save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    base = str(tmp_path / "base")
    for ask in (
        lambda: fold_model(model, tmp_path / "out"),
        lambda: fold_adapter(tmp_path / "adapter", tmp_path / "out", base=base),
        lambda: inspect_adapter(tmp_path / "adapter", base=base),
    ):
        with pytest.raises(RankfoldError, match=f"^Square{SENTENCE}"):
            ask()
    assert not (tmp_path / "out").exists()


def test_a_plan_counts_it_and_says_that_it_has_no_fold(model: PeftModel) -> None:
    found = cost(model.unload(), SquareConfig(r=2, target_modules=["q_proj"]))  # pyright: ignore[reportArgumentType]
    assert found.trained == 2 * 2 * (16 + 16)
    assert str(found.fold).startswith("Square: its update depends on the input")
