"""`rankfold plan --optimizer`: the state of a plan is the state that lies in memory after a step."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from shapes import folder, real

from rankfold import cli
from rankfold.errors import RankfoldError
from rankfold.optim.create import create
from rankfold.plan.candidates import parse
from rankfold.plan.cost import cost
from rankfold.plan.meta import meta_model
from rankfold.plan.optimizer import PlannedOptimizer

OPTIMIZERS = ("lora_plus", "lora_pro", "lora_pro:mode=efficient", "lora_rite", "lora_rite:escape=false", "lora_fa", "riemannian")  # fmt: skip


def in_memory(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every storage of the state, counts of steps left out."""
    kept = {}
    for entry in optimizer.state.values():
        for key, t in entry.items():
            if isinstance(t, torch.Tensor) and key != "step":
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(kept.values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", ["lora:r=4", "rasa:r=4,shared_rank=1", "peft:dora:r=4"])
def test_the_state_is_what_lies_in_memory(method: str, optimizer: str, tmp_path: Path) -> None:
    """With heads, gates, a shared pool and magnitudes in the plain group."""
    task, targets = "classification", ["query", "value"]
    base, planned = meta_model(str(folder(tmp_path / "base", "bert")), task), PlannedOptimizer.parse(optimizer)
    config = parse(method).config(base, task, targets)
    found = cost(base, config, planned)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(real("bert"), config)  # pyright: ignore[reportArgumentType]
    made = create(planned.row.name, model, 1e-3, **planned.options)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    made.step()
    assert found.optimizer_bytes == in_memory(made) > 0
    assert found.trained + found.head == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama = str(folder(tmp_path / "llama", "llama"))
    arguments = ["plan", "--model", llama, "--targets", "q_proj,v_proj", "--r", "4", "--optimizer", "lora_pro"]
    assert cli.main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["optimizer"] == "lora_pro"
    rows = {row["label"]: row for row in plan["methods"]}
    # the moments of every full matrix: two layers of q and v
    config: Any = meta_model(llama).config
    width, kv = config.hidden_size, config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    assert rows["lora"]["optimizer_bytes"] == 2 * 4 * config.num_hidden_layers * width * (width + kv)
    assert "penalty on the factors" in rows["adalora"]["reason"]
    assert "no trainable pair" in rows["peft:vera"]["reason"]
    assert cli.main([*arguments, "--method", "lora"]) == 0
    out = capsys.readouterr().out
    assert "state: of lora_pro" in out
    assert "AdamW" not in out
    assert all(len(line) <= 100 for line in out.splitlines())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lora_por", "optimizer='lora_por' is not known; did you mean 'lora_pro'?"),
        ("lora_pro:mode", "'mode' must look like field=value, as in lora_pro:mode=efficient"),
        ("lora_pro:mode=slow", "LoraPro: mode='slow' must be"),
        ("lora_rite:clp=1", "option clp=1 is not known; did you mean 'clip'?"),
    ],
)
def test_wrong_input(text: str, says: str) -> None:
    with pytest.raises(RankfoldError, match=says):
        PlannedOptimizer.parse(text)
