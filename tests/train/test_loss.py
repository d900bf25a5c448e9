"""The loss of a language model is TRL's, to rounding, with the head's products where labels are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from rankfold.train import loss as loss_module
from rankfold.train.loss import score_labels_only

SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 50,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


def model(
    ours: bool, dtype: torch.dtype = torch.float32, config: Any = LlamaConfig, make: Any = LlamaForCausalLM
) -> Any:
    torch.manual_seed(0)
    made = make(config(**SIZES)).to(dtype)
    made.requires_grad_(False)
    for layer in made.model.layers:
        layer.mlp.down_proj.weight.requires_grad_()
    add_fused_lm_head(made, outputs=("log_probs", "entropy", "is_top1"))
    if ours:
        score_labels_only(made)
    return made


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, 50, (3, 9))
    labels = ids.clone()
    labels[0, :4], labels[1, 6:], labels[2] = -100, -100, -100
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(m: Any, weights: Tensor | None = None) -> tuple[Any, list[Tensor]]:
    m.zero_grad()
    out = m(**batch(), fused_lm_head=True)
    weights = torch.ones(3, 8) if weights is None else weights
    (out.log_probs * weights).sum().backward()
    return out, [p.grad for p in m.parameters() if p.grad is not None]


@pytest.mark.parametrize("chunk", [1, 250, 2**24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_same_as_trls(dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    weights = torch.rand(3, 8)  # a gradient that differs from token to token, as in DFT
    (found, grads), (expected, theirs) = (step(model(ours, dtype), weights) for ours in (True, False))
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    assert_close(found.log_probs, expected.log_probs, **tolerance)
    assert_close(found.loss, expected.loss, **tolerance)
    assert torch.equal(found.label_mask, expected.label_mask)
    assert dtype == torch.bfloat16 or torch.equal(found.is_top1.bool(), expected.is_top1.bool())
    assert_close(grads, theirs, **tolerance)


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        (found, grads), (expected, theirs) = (step(model(ours)) for ours in (True, False))
    assert_close(found.log_probs, expected.log_probs, atol=2e-2, rtol=2e-2)
    assert_close(grads, theirs, atol=2e-2, rtol=2e-2)


def rows_scored(m: Any, monkeypatch: pytest.MonkeyPatch, **changed: Any) -> int:
    """How many rows the head of rankfold's loss met."""
    seen: list[int] = []
    original = loss_module.linear

    def counted(rows: Tensor, weight: Tensor) -> Any:
        seen.append(len(rows))
        return original(rows, weight)

    monkeypatch.setattr(loss_module, "linear", counted)
    with torch.no_grad():
        m(**{**batch(), "fused_lm_head": True, **changed})
    return sum(seen)


def test_rows_without_a_label_never_meet_the_head(monkeypatch: pytest.MonkeyPatch):
    assert rows_scored(model(True), monkeypatch) == 5 + 5


def test_a_batch_without_labels_has_no_gradient_and_no_nan():
    m = model(True)
    rows = batch()
    out = m(**{**rows, "labels": torch.full_like(rows["labels"], -100)}, fused_lm_head=True)
    assert out.loss == 0
    out.log_probs.sum().backward()
    assert all(not p.grad.any() for p in m.parameters() if p.grad is not None)


def test_what_it_cannot_do_is_left_to_trl(monkeypatch: pytest.MonkeyPatch):
    trained = model(True)
    trained.lm_head.weight.requires_grad_()
    assert rows_scored(trained, monkeypatch) == 0
    assert step(trained)[0].entropy.any()  # TRL's
    softcapped = model(True, config=Gemma2Config, make=Gemma2ForCausalLM)
    assert rows_scored(softcapped, monkeypatch) == 0
    assert rows_scored(model(True), monkeypatch, num_items_in_batch=3) == 0
    plain = model(True)(input_ids=batch()["input_ids"])
    assert plain.logits.shape == (3, 9, 50)
