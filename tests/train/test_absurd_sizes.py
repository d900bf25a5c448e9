"""Sizes that no machine has are one sentence with field, value and fix, before anything is allocated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from rankfold import ColaConfig, DeltaLoraConfig, PlainLoraConfig, RasaConfig, ResLoraConfig, SoraConfig
from rankfold.compare.contenders import resolve
from rankfold.compare.file import parse as parse_compare
from rankfold.errors import RankfoldError
from rankfold.host import memory
from rankfold.io.models import ModelError
from rankfold.plan.cost import cost
from rankfold.runfile.load import parse
from rankfold.tasks.rows import DataError
from rankfold.train.prepare import make_plan, prepare
from rankfold.train.run import train

Values = dict[str, Any]
HUGE = 1_000_000_000
SAID = r"r=1000000000 makes an adapter of [\d.,]+ GB on this model, and this machine has .* choose a smaller r \(the largest rank"


def silent(sentence: str) -> None:
    pass


def llama() -> LlamaForCausalLM:
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=24, **sizes))


@pytest.mark.parametrize("config", [PlainLoraConfig, RasaConfig, SoraConfig, DeltaLoraConfig])
def test_get_peft_model_leaves_the_model_as_it_was(config: Any) -> None:
    model = llama()
    names = [name for name, _ in model.named_modules()]
    for fields in ({"r": HUGE}, {"r": 4, "rank_pattern": {"q_proj": HUGE}}):
        with pytest.raises(
            RankfoldError, match=SAID if fields["r"] == HUGE else r"rank_pattern.q_proj=1000000000 makes"
        ):
            get_peft_model(model, config(target_modules=["q_proj", "v_proj"], **fields))
    with pytest.raises(RankfoldError, match="more bytes than 64 bits can count"):
        get_peft_model(model, config(r=10**30, target_modules=["q_proj"]))
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("config", [PlainLoraConfig, LoraConfig])
def test_a_plan(config: Any) -> None:
    with torch.device("meta"):
        model = llama()
    with pytest.raises(RankfoldError, match=SAID):
        cost(model, config(r=HUGE, target_modules=["q_proj"]))
    assert (
        cost(model, config(r=100, target_modules=["q_proj"])).trained == 2 * 100 * 32
    )  # above min(in, out): PEFT allows it


@pytest.mark.parametrize("method", ["lora", "rasa", "peft:lora", "peft:dora"])
def test_a_run_and_its_dry_run(classification: Values, method: str) -> None:
    run = parse(classification | {"method": {"name": method, "r": HUGE, "target_modules": ["query"]}})
    for attempt in (lambda: make_plan(prepare(run)), lambda: train(run, say=silent)):
        with pytest.raises(ModelError, match=f"method: .*{SAID}"):
            attempt()


def test_a_comparison_leaves_it_out(classification: Values) -> None:
    values = {key: classification[key] for key in ("model", "task", "data", "output")}
    methods = [{"name": "lora", "r": 2}, {"name": "lora", "r": HUGE, "label": "huge"}]
    shared = {"methods": methods, "targets": ["query"], "rates": [1e-3], "seeds": [0], "training": {"max_steps": 2}}
    data = {**values["data"], "validation": 0.2, "test": 0.2} if "validation" not in values["data"] else values["data"]
    entries = resolve(parse_compare(values | shared | {"data": data})).entries
    assert [entry.reason is None for entry in entries] == [True, False]
    assert "choose a smaller r" in (entries[1].reason or "")


def test_what_fits_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a rank that is above min(in, out), which PEFT's LoRA allows."""
    get_peft_model(llama(), PlainLoraConfig(r=100, target_modules=["q_proj"]))  # pyright: ignore
    monkeypatch.setattr(memory, "memory", lambda device: None)  # a system that does not say
    get_peft_model(llama(), PlainLoraConfig(r=100, target_modules=["q_proj"]))  # pyright: ignore


def test_a_huge_batch_is_all_rows_and_no_row_is_longer_than_the_model_takes(classification: Values) -> None:
    train(parse(classification, ["training.batch_size=1000000", "training.epochs=1"]), say=silent)
    with pytest.raises(DataError, match=r"data.max_length: 1,000,000,000 tokens do not fit the model, which takes"):
        prepare(parse(classification, ["data.max_length=1000000000"]))


def test_other_counts_of_methods() -> None:
    """More layers or links than there are mean all of them, or are refused when the length of the run is known."""
    get_peft_model(llama(), ResLoraConfig(previous=HUGE, target_modules=["q_proj"]))  # pyright: ignore
    get_peft_model(llama(), ColaConfig(links=HUGE, target_modules=["q_proj"]))  # pyright: ignore
    with pytest.raises(RankfoldError, match=r"shared_rank=1000000000 exceeds r=8"):
        RasaConfig(shared_rank=HUGE)
