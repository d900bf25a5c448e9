"""Runs on a mixture of experts: what is not reached is said before training, and what is reached trains and folds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny import byte_tokenizer

from rankfold.fold import fold_adapter
from rankfold.runfile.load import parse
from rankfold.train.prepare import make_plan, prepare
from rankfold.train.run import train


@pytest.fixture
def mixture(language_model: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    sizes = {
        "hidden_size": 16,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    config = hf.Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        **sizes,
        num_key_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    hf.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    return language_model | {"model": str(tmp_path / "moe")}


def test_a_dry_run_names_what_is_not_reached(mixture: dict[str, Any]) -> None:
    plan = make_plan(prepare(parse(mixture | {"method": {"name": "rasa", "r": 2, "target_modules": ["q_proj"]}})))
    (note,) = (note for note in plan.notes if note.startswith("no adapter on: "))
    assert "embeddings" in note
    assert "fused experts" in note
    assert "% of the parameters (model.layers.0.mlp.experts.gate_up_proj and 3 more)" in note


def test_experts_train_and_fold(mixture: dict[str, Any], tmp_path: Path) -> None:
    run = parse(
        mixture
        | {"method": {"name": "rasa", "r": 2, "target_modules": ["v_proj", "gate_proj", "up_proj", "down_proj"]}}
    )
    assert not any("experts" in note for note in make_plan(prepare(run)).notes)
    train(run, say=lambda _: None)
    report = fold_adapter(Path(run.output), tmp_path / "folded", base=run.model.name)
    assert report.worst.frobenius < 1e-6
    assert report.probe["max_logit_error"] < 1e-4  # pyright: ignore[reportOperatorIssue]
