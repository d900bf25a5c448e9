"""Rank settings for a budget: never exceeded, and one more would."""

from __future__ import annotations

import pytest
from peft import FourierFTConfig, IA3Config, LoKrConfig, LoraConfig, OFTConfig, PeftConfig, VeraConfig
from shapes import folder
from torch import nn

from rankfold import AdaSvdConfig, PlainLoraConfig, RasaConfig
from rankfold.plan.candidates import everyone
from rankfold.plan.cost import trained
from rankfold.plan.match import largest, match, parse_budget
from rankfold.plan.meta import meta_model
from rankfold.plan.ranks import setting

CANDIDATES = {c.label: c.with_rank(8) for c in everyone()}
BUDGET = 3000


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return meta_model(str(folder(tmp_path_factory.mktemp("llama"), "llama")), "causal-lm")


@pytest.mark.parametrize("label", CANDIDATES)
@pytest.mark.parametrize("budget", [800, BUDGET, 8192])
def test_never_exceeded_and_the_next_would(label: str, budget: int, llama: nn.Module) -> None:
    config = CANDIDATES[label].config(llama, "causal-lm", ["q_proj", "v_proj", "down_proj"])
    found = match(llama, config, budget)
    assert found.cost.trained == trained(llama, found.config) <= budget
    assert found.share == found.cost.trained / budget
    one = setting(found.config)
    if found.full:
        assert label in ("peft:vera", "peft:lokr", "peft:loha", "cora 1", "rac_lora", "sbora fa", "sbora fb")
        assert one.value <= 32  # the rank of the largest matrix
    else:
        assert trained(llama, one.at(one.value + 1)) > budget


def test_what_goes_with_the_rank(llama: nn.Module) -> None:
    def at(config: PeftConfig, budget: int = BUDGET) -> PeftConfig:
        return match(llama, config, budget).config

    where = ["q_proj", "v_proj", "down_proj"]
    rasa = at(RasaConfig(r=8, shared_rank=6, target_modules=where), 1500)
    assert (rasa.r, rasa.shared_rank) == (3, 3)  # pyright: ignore[reportAttributeAccessIssue]
    ada = at(AdaSvdConfig(r=12, target_r=8, target_modules=where), 2200)
    assert (ada.r, ada.target_r) == (5, 3)  # pyright: ignore[reportAttributeAccessIssue]
    before = LoraConfig(r=8, lora_alpha=3, target_modules=where)
    after = at(before)
    assert (before.r, after.lora_alpha) == (8, 3)  # pyright: ignore[reportAttributeAccessIssue]
    assert at(FourierFTConfig(n_frequency=40, target_modules=where), 600).n_frequency == 100  # pyright: ignore[reportAttributeAccessIssue]
    fixed = at(PlainLoraConfig(r=1, rank_pattern={"down_proj": 2}, target_modules=where), 1000)
    assert fixed.rank_pattern == {"down_proj": 2}  # pyright: ignore[reportAttributeAccessIssue]


def test_the_budget_of_a_lora_is_that_lora(llama: nn.Module) -> None:
    config = PlainLoraConfig(r=5, target_modules="all-linear")
    found = match(llama, LoraConfig(r=1, target_modules="all-linear"), trained(llama, config))
    assert (found.config.r, found.share, found.full) == (5, 1.0, False)  # pyright: ignore[reportAttributeAccessIssue]


def test_what_cannot_be_solved(llama: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"^PlainLoraConfig: even r=1 trains 256 parameters, and the budget is 100$"):
        match(llama, PlainLoraConfig(target_modules=["q_proj", "o_proj"]), 100)
    for config in (OFTConfig(target_modules=["q_proj"]), IA3Config(target_modules=["q_proj"], feedforward_modules=[])):
        with pytest.raises(ValueError, match="has no rank"):
            match(llama, config, 1000)
    with pytest.raises(ValueError, match="target_modules"):
        match(llama, VeraConfig(target_modules=["nowhere"]), 1000)


def test_a_full_method_takes_its_first_rank_that_is_full(llama: nn.Module) -> None:
    found = match(llama, LoKrConfig(target_modules=["q_proj"]), 100_000)
    assert found.full
    one = setting(found.config)
    assert trained(llama, one.at(one.value - 1)) < found.cost.trained


@pytest.mark.parametrize("guess", [1, 8, 500])
def test_a_straight_line_takes_few_counts(guess: int) -> None:
    counted = []

    def count(n: int) -> int:
        counted.append(n)
        return 1000 + 333 * n

    assert largest(count, 4096, 100_000, guess) == (297, False)
    assert len(counted) <= 5


@pytest.mark.parametrize("budget", range(0, 40, 3))
def test_any_rising_curve(budget: int) -> None:
    def count(n: int) -> int:
        return min(n * n // 7 + 2, 30)

    found, full = largest(count, 50, budget, guess=8)
    fits = [n for n in range(1, 51) if count(n) <= budget]
    assert full == (len(fits) == 50)
    assert found == (14 if full else max(fits, default=0))


def test_budgets_in_words() -> None:
    assert [parse_budget(t) for t in ("1200000", "1.2M", "300k", "1_000", "2,000")] == [1200000, 1200000, 300000, 1000, 2000]  # fmt: skip
    assert [parse_budget(t) for t in ("1,200,000", "12_00", "0.5k", "1.2 M")] == [1_200_000, 1200, 500, 1_200_000]
    wrong_commas = ("1,2M", "1,200M", "1,2", "12,00", "1,2000", ",200", "1,200,00")
    for bad in ("", "-3", "0", "M", "1.2MB", "lots", "nan", "9" * 400, *wrong_commas):
        with pytest.raises(ValueError, match="is not a number of parameters"):
            parse_budget(bad)


def test_a_method_that_refuses_a_larger_rank_stays_at_its_largest(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(self: PlainLoraConfig) -> None:
        if self.r > 5:
            raise ValueError(f"PlainLoraConfig: r={self.r} must be <= 5, the rank of its basis")

    monkeypatch.setattr(PlainLoraConfig, "check", check)
    found = match(llama, PlainLoraConfig(r=2, target_modules=["q_proj"]), 1_000_000)
    assert (found.config.r, found.full) == (5, True)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=r"^PlainLoraConfig: r=6 must be <= 5"):
        match(llama, setting(PlainLoraConfig(r=2, target_modules=["q_proj"])).at(6), 1_000_000)
