"""A plan counts what a chain trains at a time apart from what all its links are in the file and in the fold."""

from __future__ import annotations

import pytest
from peft import PeftConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rankfold import ColaConfig, DeltaLoraConfig, RacLoraConfig, XgbLoraConfig
from rankfold.host.config import LowRankConfig
from rankfold.io.models import meta_copy
from rankfold.plan.cost import cost
from rankfold.plan.folding import Fold

OUT, IN, LAYERS = 64, 32, 2


@pytest.fixture(scope="module")
def base() -> nn.Module:
    sizes = {"hidden_size": IN, "intermediate_size": OUT, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    return meta_copy(LlamaForCausalLM(LlamaConfig(vocab_size=48, **sizes)))


PAIR = LAYERS * 4 * (IN + OUT)  # rank 4 in every up_proj


@pytest.mark.parametrize(
    ("config", "trained", "stored", "rank"),
    [
        (ColaConfig.planned(r=4, links=3), PAIR, 3 * PAIR, 12),
        (ColaConfig.planned(r=4, link_shares=[0.5, 0.5]), PAIR, 2 * PAIR, 8),
        (ColaConfig.planned(r=4, link_steps=100), PAIR, PAIR, 4),  # how many links depends on the run
        (RacLoraConfig.planned(r=4, links=2), LAYERS * 4 * OUT, 2 * PAIR, 8),
        (RacLoraConfig.planned(r=4, links=2, side="left"), LAYERS * 4 * IN, 2 * PAIR, 8),
        (XgbLoraConfig.planned(r=4), PAIR, PAIR, 4),
        (DeltaLoraConfig.planned(r=4), PAIR, 2 * PAIR, 8),
        (ColaConfig.planned(r=4, links=100), PAIR, PAIR + 8 * PAIR, 32),  # no more than full rank
    ],
    ids=lambda v: v.method if isinstance(v, PeftConfig) else None,
)
def test_live_and_cumulative_parameters(
    base: nn.Module, config: LowRankConfig, trained: int, stored: int, rank: int
) -> None:
    config.target_modules = ["up_proj"]
    found = cost(base, config)
    assert (found.trained, found.stored) == (trained, stored)
    assert found.optimizer_bytes == 8 * trained
    assert isinstance(found.fold, Fold)
    assert found.fold.rank == rank


def test_a_budget_solves_for_the_live_rank() -> None:
    larger = ColaConfig.planned(r=8, links=2, link_ranks=[8, 2]).with_rank(4)
    assert (larger.r, larger.link_ranks) == (4, [4, 2])
    assert XgbLoraConfig.fields_at(8) == {"r": 1}
