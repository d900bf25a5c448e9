"""A model stored in fewer bits: what is trained is float32 all the same, wherever it is, and the rest keeps its type."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertModel, RobertaConfig, RobertaModel, TrainerCallback

from rankfold.fold import fold_adapter
from rankfold.io.models import ModelError
from rankfold.runfile.load import parse
from rankfold.train.prepare import make_plan, prepare
from rankfold.train.run import train

Values = dict[str, Any]


def silent(sentence: str) -> None:
    pass


class Trained(TrainerCallback):
    """The types of what is trained and of what is not, and how far the former moves."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.types = {p.dtype for p in model.parameters() if p.requires_grad}
        self.frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
        self.first = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        now = dict(model.named_parameters())
        self.moved = {n: float((now[n] != p).float().mean()) for n, p in self.first.items() if "modules_to_save" in n}


@pytest.fixture
def narrow(classification: Values, tmp_path: Path) -> Values:
    """A run on a model in bfloat16 without a pooler, so that a module in its trunk is new and trained too."""
    folder = tmp_path / "narrow"
    shutil.copytree(classification["model"], folder)
    BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.bfloat16).save_pretrained(folder)
    method = {"name": "lora", "r": 2, "target_modules": ["query"]}
    training = {**classification["training"], "learning_rate": 2e-5, "epochs": 1}
    return classification | {"model": str(folder), "method": method, "training": training}


@pytest.mark.parametrize("method", ["lora", "peft:lora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_head_is_trained_in_float32(narrow: Values, precision: str, method: str):
    seen = Trained()
    options = [f"training.precision={precision}", f"method.name={method}"]
    plan = make_plan(prepare(parse(narrow, options)))
    result = train(parse(narrow, options), callbacks=[seen], say=silent)
    assert (seen.types, seen.frozen) == ({torch.float32}, {torch.bfloat16})
    assert plan.budget.trained_bytes == 4 * plan.budget.trainable
    assert len(seen.moved) == 4, "pooler and classifier"
    assert min(seen.moved.values()) > 0.9  # of 2⁻⁸ of themselves a quarter would not have
    saved = load_file(result.adapter_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    more = [*options, f"training.start_from={result.adapter_path}", f"output={result.output}-more"]
    again = train(parse(narrow, more), say=silent)
    assert again.before == result.after


def test_it_is_resumed_to_the_bit(narrow: Values):
    whole, cut = (parse(narrow, [f"output={narrow['output']}-{name}"]) for name in ("whole", "cut"))

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cut, callbacks=[Kill()], say=silent)
    resumed = train(cut, resume=True, say=silent)
    assert resumed.resumed_at == 2
    first, second = (
        load_file(r.adapter_path / "adapter_model.safetensors") for r in (train(whole, say=silent), resumed)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_it_is_folded(narrow: Values, tmp_path: Path):
    result = train(parse(narrow), say=silent)
    head = load_file(result.adapter_path / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    fold_adapter(result.adapter_path, tmp_path / "merged", profile="merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")["classifier.weight"]
    assert torch.equal(merged, head.to(merged.dtype))


def test_a_head_of_several_layers(narrow: Values, tmp_path: Path):
    folder = tmp_path / "roberta"
    shutil.copytree(narrow["model"], folder)
    config = RobertaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    RobertaModel(config).bfloat16().save_pretrained(folder)
    seen = Trained()
    train(parse(narrow, [f"model={folder}"]), callbacks=[seen], say=silent)
    assert (len(seen.moved), seen.types) == (4, {torch.float32})


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head", "input_layernorm"])
def test_parts_of_a_language_model(language_model: Values, name: str):
    language_model["model"] = {"name": language_model["model"], "dtype": "bfloat16"}
    seen = Trained()
    train(parse(language_model, [f"method.modules_to_save=[{name}]"]), callbacks=[seen], say=silent)
    assert (seen.types, seen.frozen) == ({torch.float32}, {torch.bfloat16})


def test_what_cannot_be_widened_is_refused(narrow: Values):
    with pytest.raises(ModelError, match=r"it trains .*bias alone of its module, in torch.bfloat16, .*set model.dtype"):
        train(parse(narrow, ["method.name=peft:lora", "method.bias=all"]), say=silent)
