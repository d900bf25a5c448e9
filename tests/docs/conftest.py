"""Where snippets run: an empty folder, with small random models in the place of the bundled ones."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "train"), str(ROOT / "docs")]
from tiny import byte_tokenizer  # noqa: E402

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random Llama and a random BERT by the names of the bundled models."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), byte_tokenizer()
    torch.manual_seed(0)
    words = {"vocab_size": len(tokenizer), "pad_token_id": 0, "max_position_embeddings": 128}
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, **words, eos_token_id=1, bos_token_id=None))
    bert = BertModel(BertConfig(**SIZES, **words))
    places = {}
    for name, model in (("smollm2-135m-instruct", llama), ("all-minilm-l6-v2", bert)):
        places[name] = folder / name
        model.save_pretrained(places[name])
        tokenizer.save_pretrained(places[name])
    return places


@pytest.fixture(scope="session")
def files(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the paths in snippets name: models, adapters, a fold and CoRA's basis."""
    import peft

    from rankfold import PlainLoraConfig, RasaConfig
    from rankfold.fold import fold_adapter
    from rankfold.methods.cora_subspace import build_subspace

    root, llama = tmp_path_factory.mktemp("files"), models["smollm2-135m-instruct"]
    about = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
    for place, config in {
        "adapter": RasaConfig(**about),
        "runs/sums/adapter": RasaConfig(**about),
        "runs/a/adapter": PlainLoraConfig(**about),
        "runs/b/adapter": PlainLoraConfig(**about),
    }.items():
        peft.get_peft_model(LlamaForCausalLM.from_pretrained(llama), config).save_pretrained(str(root / place))
    fold_adapter(root / "adapter", root / "served", probe=False)
    tuned = LlamaForCausalLM.from_pretrained(llama)
    for p in tuned.parameters():
        p.data += 0.01 * torch.randn_like(p)
    for place, model in {"base": LlamaForCausalLM.from_pretrained(llama), "tuned": tuned}.items():
        model.save_pretrained(root / place)
    (root / "bases").mkdir()
    build_subspace(
        [models["all-minilm-l6-v2"]], root / "bases/qkv.safetensors", targets=("query", "key", "value"), rank=8
    )
    return root


@pytest.fixture
def snippets(
    models: dict[str, Path], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Runs the Python of a page, with two steps where it asks for more and with the models above where it names bundled ones."""
    from rankfold.io import assets
    from rankfold.optim import registry as optimizers

    monkeypatch.setattr(optimizers, "OPTIMIZERS", dict(optimizers.OPTIMIZERS))
    monkeypatch.chdir(tmp_path)
    for there in files.iterdir():
        (shutil.copytree if there.is_dir() else shutil.copy)(there, tmp_path / there.name)
    monkeypatch.setattr(assets, "model_path", lambda name: models[name])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("rankfold.io.cache.cache_root", lambda: tmp_path / "cache")
    datasets.disable_progress_bars()
    names: dict[str, object] = {"__name__": "snippet"}
    module = type(sys)("snippet")
    module.__dict__.update(names)
    monkeypatch.setitem(sys.modules, "snippet", module)

    def run(code: str) -> dict[str, Any]:
        exec(compile(code, "snippet", "exec"), module.__dict__)
        return module.__dict__

    yield run
    transformers.logging.set_verbosity_warning()
