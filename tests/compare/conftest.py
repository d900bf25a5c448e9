"""Comparisons of tiny models with random weights; nothing is downloaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from rankfold.compare import experiment as run_module
from rankfold.compare.trial_file import TrialLine
from rankfold.compare.trial_process import JOB, measure
from rankfold.train.trainers import DivergedError

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
from tiny import byte_tokenizer, sentiment, write_jsonl

Values = dict[str, Any]


@pytest.fixture(autouse=True)
def _quiet(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With dropout of its own, three layers."""
    folder, tokenizer = tmp_path_factory.mktemp("bert"), byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), **sizes, max_position_embeddings=64, pad_token_id=0)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("llama"), byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "max_position_embeddings": 128}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, **tokens, num_key_value_heads=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def splits(folder: Path, rows: Callable[[int, int], list[Values]]) -> Path:
    folder.mkdir()
    for start, (split, count) in enumerate({"train": 32, "validation": 8, "test": 9}.items()):
        write_jsonl(folder / f"{split}.jsonl", rows(count, 100 * start))
    return folder


@pytest.fixture
def values(bert: Path, tmp_path: Path) -> Values:
    """A compare file of two methods, with one rate and one seed; eight steps a trial."""
    return {
        "model": str(bert),
        "task": "classification",
        "data": {"source": str(splits(tmp_path / "reviews", sentiment))},
        "training": {"max_steps": 8, "batch_size": 8, "log_every": 1, "evaluate_every": 4},
        "methods": [
            {"name": "peft:lora", "label": "LoRA", "r": 2},
            {"name": "rasa", "label": "RaSA", "r": 2, "shared_rank": 1},
        ],
        "rates": [0.01],
        "seeds": [0],
        "output": str(tmp_path / "out"),
    }


@pytest.fixture
def sums(values: Values, llama: Path, tmp_path: Path) -> Values:
    """The same for a language model."""

    def rows(count: int, start: int) -> list[Values]:
        return [
            {"prompt": f"{i} plus {i} is", "completion": f" {2 * i}" + "!" * (i % 3)}
            for i in range(start, start + count)
        ]

    data = {"source": str(splits(tmp_path / "sums", rows))}
    return values | {"model": str(llama), "task": "causal-lm", "data": data}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trials run in this process, one after the other, which saves them from starting one; the ids that were run."""
    ran: list[str] = []

    def submit(folder: Path, line: TrialLine) -> Future[TrialLine]:
        ran.append(line.id)
        until = json.loads((folder / JOB).read_text())["until"]
        future: Future[TrialLine] = Future()
        try:
            done = measure(line, folder, until)
        except (ValueError, RuntimeError) as e:
            done = replace(line, status="diverged" if isinstance(e, DivergedError) else "failed", reason=str(e))
        future.set_result(replace(done, wall_seconds=1.0))
        return future

    @contextmanager
    def executor(*args: Any) -> Iterator[Any]:
        yield submit

    monkeypatch.setattr(run_module, "executor", executor)
    return ran
