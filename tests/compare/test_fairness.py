"""With one seed every method sees the same rows in the same order, and starts from the same head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from rankfold.compare.contenders import Entry
from rankfold.compare.file import parse
from rankfold.compare.trial_list import make
from rankfold.runfile.load import parse as parse_run
from rankfold.train.run import train
from rankfold.train.trainers import CarefulTrainer

Values = dict[str, Any]

# They draw very different amounts of random numbers when they initialise.
METHODS: list[Values] = [
    {"name": "peft:lora", "r": 2},
    {"name": "rasa", "r": 4, "shared_rank": 1},
    {"name": "sora", "r": 8, "threshold": 1e-3},
]


class Start(TrainerCallback):
    """What a run starts from: the head, and the state of the generator that draws dropout."""

    def __init__(self) -> None:
        self.head: dict[str, torch.Tensor] = {}
        self.random = torch.empty(0)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.head = {n: p.detach().clone() for n, p in model.named_parameters() if "modules_to_save" in n}
            self.random = torch.get_rng_state()


def seen(values: Values, method: Values, seed: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], Start]:
    batches: list[Any] = []
    step = CarefulTrainer.training_step

    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        batches.append([[token for token in row if token] for row in inputs["input_ids"].tolist()])  # 0 pads
        return step(self, model, inputs, *args, **kwargs)

    start = Start()
    with monkeypatch.context() as m:
        m.setattr(CarefulTrainer, "training_step", training_step)
        trial = make(Entry("x", "all", method), parse(values), 0.01, seed, 1.0, 0.0)
        train(parse_run(trial.line.run), callbacks=[start], say=lambda _: None)
    return batches, start


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_one_seed_one_order(values: Values, sums: Values, task: str, monkeypatch: pytest.MonkeyPatch):
    values = sums if task == "causal-lm" else values
    methods = [m | {"target_modules": "all-linear"} for m in METHODS[: 2 if task == "causal-lm" else None]]
    first, start = seen(values, methods[0], 0, monkeypatch)
    assert len(first) == 8
    assert first[:4] != first[4:]  # another order in the second epoch
    for method in methods[1:]:
        batches, other = seen(values, method, 0, monkeypatch)
        assert batches == first
        assert torch.equal(other.random, start.random)
        assert list(start.head) == list(other.head)
        assert all(torch.equal(start.head[name], other.head[name]) for name in start.head)
    assert bool(start.head) == (task == "classification")
    batches, other = seen(values, methods[0], 1, monkeypatch)
    assert batches != first
    assert sorted(row for batch in batches[:4] for row in batch) == sorted(row for batch in first[:4] for row in batch)
    assert all(not torch.equal(start.head[n], other.head[n]) for n in start.head if n.endswith("weight"))
