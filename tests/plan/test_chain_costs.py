"""A plan counts what a chain trains at a time apart from what all its links are in the file and in the fold."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import PeftConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rankfold import ColaConfig, DeltaLoraConfig, RacLoraConfig, XgbLoraConfig
from rankfold.host.config import LowRankConfig
from rankfold.io.models import meta_copy
from rankfold.plan.cost import cost
from rankfold.plan.costs import run_costs
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
    live = {"xgblora": trained // LAYERS, "delta_lora": None}.get(config.method, trained)
    assert found.live == live
    assert found.cumulative == (stored if live and config.parts() else None)
    assert found.optimizer_bytes == 8 * trained
    assert isinstance(found.fold, Fold)
    assert found.fold.rank == rank


def test_a_booster_trains_the_layers_it_draws() -> None:
    sizes = {"layers.0.q": 4, "layers.0.v": 4, "layers.1.q": 4, "layers.1.v": 4, "layers.2.q": 4, "pooler": 40}
    assert XgbLoraConfig(layers_drawn=1).live(sizes) == 40  # the largest: at most
    assert XgbLoraConfig(layers_drawn=2).live(sizes) == 48
    assert XgbLoraConfig(layers_drawn=9).live(sizes) == sum(sizes.values())
    assert ColaConfig().live(sizes) == sum(sizes.values())


def test_a_plan_says_what_is_live(base: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base.config.save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    plan = run_costs(str(tmp_path), methods=["cola:links=2", "xgblora", "lora"], targets=["up_proj"])
    cola, xgb, lora = (row.to_dict() for row in plan.rows)
    assert (cola["live"], cola["cumulative"]) == (2 * PAIR, 4 * PAIR)
    assert (xgb["live"], xgb["cumulative"]) == (PAIR // 4 // LAYERS, None)
    assert (lora["live"], lora["cumulative"]) == (None, None)
    assert xgb["first_rate"] >= lora["first_rate"] > 0
    said = " ".join(capsys.readouterr().out.split())
    assert "live: at most 96 of its parameters are trained at a time; cumulative: as many for each part" in said
    assert "cumulative: 3,072" in said
    assert (
        f"# training.learning_rate {lora['first_rate']:g} to begin with, where LoRA's at alpha/r = 2 is 0.002" in said
    )


def test_a_budget_solves_for_the_live_rank() -> None:
    larger = ColaConfig.planned(r=8, links=2, link_ranks=[8, 2]).with_rank(4)
    assert (larger.r, larger.link_ranks) == (4, [4, 2])
    assert XgbLoraConfig.fields_at(8) == {"r": 1}
