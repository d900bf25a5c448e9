"""Tiny models with random weights and rows of four classes; nothing is downloaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
from tiny import byte_tokenizer, write_jsonl

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = {"good": "pos", "bad": "neg", "so-so": "even", "what": "odd"}


@pytest.fixture(autouse=True)
def _quiet(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("bert"), byte_tokenizer()
    torch.manual_seed(0)
    dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=len(tokenizer), **SIZES, **dropout, max_position_embeddings=64, pad_token_id=0)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("llama"), byte_tokenizer()
    torch.manual_seed(0)
    tokens: dict[str, Any] = {
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "max_position_embeddings": 128,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES, **tokens)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl and test.jsonl; the class is in the first word."""
    folder = tmp_path_factory.mktemp("reviews")
    for start, (split, count) in enumerate({"train": 8, "test": 4}.items()):
        rows = [
            {"text": f"{word} film number {100 * start + i}", "label": label}
            for i in range(count)
            for word, label in WORDS.items()
        ]
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture
def values(bert: Path, reviews: Path, tmp_path: Path) -> dict[str, Any]:
    """Two tasks of two classes, four steps each."""
    return {
        "model": str(bert),
        "task": "classification",
        "data": {"source": str(reviews)},
        "split": {"parts": 2},
        "method": {"name": "sd_lora", "r": 2, "target_modules": ["query", "value"]},
        "training": {"max_steps": 4, "batch_size": 4, "learning_rate": 0.01, "log_every": 1, "evaluate_every": 2},
        "output": str(tmp_path / "row"),
    }
