"""Tiny models with random weights and small files of rows: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny import byte_tokenizer, sentiment, write_jsonl
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM


@pytest.fixture(autouse=True)
def _quiet(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        hidden_dropout_prob=0.0,  # the adapter has dropout of its own
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """A folder with train.jsonl, validation.jsonl and test.jsonl."""
    folder = tmp_path / "reviews"
    folder.mkdir()
    for start, (split, count) in enumerate({"train": 32, "validation": 8, "test": 8}.items()):
        write_jsonl(folder / f"{split}.jsonl", sentiment(count, 100 * start))
    return folder


@pytest.fixture
def classification(bert: Path, reviews: Path, tmp_path: Path) -> dict[str, Any]:
    """The values of a run file for two epochs of four steps."""
    return {
        "model": str(bert),
        "task": "classification",
        "data": {"source": str(reviews)},
        "method": {"name": "rasa", "r": 2, "shared_rank": 1, "target_modules": "all-linear", "lora_dropout": 0.1},
        "training": {"epochs": 2, "batch_size": 8, "learning_rate": 0.01, "log_every": 1, "evaluate_every": 2},
        "output": str(tmp_path / "run"),
    }


@pytest.fixture
def language_model(llama: Path, tmp_path: Path) -> dict[str, Any]:
    """The values of a run file for four steps."""
    rows = [{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}"} for i in range(24)]
    return {
        "model": str(llama),
        "task": "causal-lm",
        "data": {"train": str(write_jsonl(tmp_path / "sums.jsonl", rows)), "validation": 0.3},
        "method": {"name": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]},
        "training": {"max_steps": 4, "batch_size": 4, "learning_rate": 0.01, "log_every": 1, "evaluate_every": 2},
        "output": str(tmp_path / "run"),
    }
