"""A first learning rate: what it follows from, and which methods have one."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from rankfold import RasaConfig
from rankfold.errors import RankfoldError
from rankfold.host import registry
from rankfold.methods.cora import CoraConfig
from rankfold.methods.lora import PlainLoraConfig
from rankfold.plan import first_rate as module
from rankfold.plan.first_rate import distance, first_rate, measured

LAYERS = 3


def rate(config: peft.PeftConfig, lora_rate: float = 2e-3, optimizer: str = "adamw_torch", **options: object) -> float:
    return measured(config, lora_rate, LAYERS, optimizer, options)


def test_lora_at_its_own_scale_has_its_own_rate():
    assert rate(PlainLoraConfig(r=8, lora_alpha=16)) == pytest.approx(2e-3, rel=0.03)
    assert rate(peft.LoraConfig(r=8, lora_alpha=16), 5e-4) == pytest.approx(5e-4, rel=0.03)


def test_a_larger_scale_wants_a_smaller_rate():
    found = [rate(PlainLoraConfig(r=8, lora_alpha=a)) for a in (8, 16, 64)]
    assert found == sorted(found, reverse=True)
    # One step moves B alone, by ± the rate in every entry: ‖dΔW‖ = s·rate·√out·‖A‖, so s·√r counts
    small = rate(PlainLoraConfig(r=8, lora_alpha=16 * 8**0.5), 1e-5)
    assert small == pytest.approx(1e-5 / 8**0.5, rel=0.05)


def test_pools_of_more_layers_have_smaller_gates_and_a_larger_rate():
    config = RasaConfig(r=1, shared_rank=1, lora_alpha=16)
    found = [first_rate(config, layers=n) for n in (2, 12)]
    assert found[0] < found[1]


@pytest.mark.parametrize("name", sorted(registry.METHODS))
def test_every_method_has_one(name: str):
    cls = registry.METHODS[name].config
    fields = {"approach": 2} if cls is CoraConfig else {}
    assert 1e-6 < rate(cls.planned(**fields)) < 1


@pytest.mark.parametrize("optimizer", ["lora_plus", "lora_pro", "lora_rite", "lora_fa", "riemannian"])
def test_every_optimizer_has_one(optimizer: str):
    assert 1e-7 < rate(PlainLoraConfig(r=8, lora_alpha=16), optimizer=optimizer) < 1


def test_what_is_of_one_model_does_not_count():
    config = PlainLoraConfig(r=8, lora_alpha=16, rank_pattern={"q": 2}, target_modules=["q"], layers_to_transform=[0])
    assert rate(config) == rate(PlainLoraConfig(r=8, lora_alpha=16))


@pytest.mark.parametrize("cls", [PlainLoraConfig, peft.LoraConfig])
def test_dropout_does_not_count(cls: type[peft.PeftConfig]):
    fields: dict[str, Any] = {"r": 8, "lora_alpha": 16}
    assert rate(cls(**fields, lora_dropout=0.5)) == rate(cls(**fields))  # pyright: ignore[reportCallIssue]


def test_the_callers_generator_stays(recwarn: pytest.WarningsRecorder):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    distance(PlainLoraConfig(), 1e-3, LAYERS, "adamw_torch", {})
    assert torch.equal(before, torch.get_rng_state())
    assert not recwarn.list


def test_what_cannot_be_measured(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RankfoldError, match=r"PromptTuningConfig: no first rate, as its steps .*; give rates"):
        rate(peft.PromptTuningConfig(num_virtual_tokens=3))
    stays = peft.LoraConfig(r=8)
    monkeypatch.setattr(module, "distance", lambda config, rate, *_: min(rate, 1e-4) if config is stays else rate)
    with pytest.raises(
        RankfoldError, match=r"LoraConfig: no first rate: at none does its update move as far as LoRA's"
    ):
        rate(stays)
    monkeypatch.setattr(module, "distance", lambda *_: 0.0)
    with pytest.raises(RankfoldError, match=r"20 steps move its update by 0"):
        module.measured(stays, 2e-3, 1, "adamw_torch", {})


def test_other_optimizers():
    with pytest.raises(RankfoldError, match="'sgd' is neither AdamW nor one of"):
        rate(PlainLoraConfig(), optimizer="sgd")
