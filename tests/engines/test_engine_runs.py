"""vLLM with our folds, where its environment is there already; and what judges and records such runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import environments
import pytest
import torch
from artefacts import ARTEFACTS, Shelf, random_llama
from bench import Bench
from environments import Unavailable
from judge import Reference, apart, measure
from record import BEGIN, END, KEPT, PAGE, tables
from torch import nn

from engines import ENGINES
from rankfold.doctor.engine_runs import engine_runs
from rankfold.doctor.engines import ENGINES as DOCTORS
from rankfold.fold import PROFILES


@pytest.mark.slow
def test_vllm(tmp_path: Path) -> None:
    """Every fold that it takes, on a small random model. `make test-engine ENGINE=vllm` makes the environment and asks more."""
    if environments.existing("vllm") is None:
        pytest.skip(
            "vLLM's environment is not in the cache (2.5 GB); make test-engine ENGINE=vllm makes it and runs this and more"
        )
    bench = Bench(Shelf(random_llama(tmp_path), tmp_path), steps=16)
    version, rows = bench.run(ENGINES["vllm"], ["uniform", "compact"])
    assert version == "0.32.0"
    assert len(rows) == 1 + 2 * len(ARTEFACTS)
    assert {f"{row.profile} {row.artefact}": row.failures for row in rows if row.failures} == {}


# What judges ------------------------------------------------------------------------------------------------------------


class Counter(nn.Module):
    """The likeliest token behind t is t + 1, then t + 2 …"""

    def forward(self, ids: torch.Tensor) -> Any:
        logits = -((torch.arange(10) - ids[..., None] - 1) % 10).float()
        return type("Output", (), {"logits": logits})


def said(tokens: list[int], off: float = 0.0) -> list[dict[str, Any]]:
    """The answer to the prompt [0] that writes these tokens, with all log-probabilities off by so much."""
    ids = torch.tensor([[0, *tokens]])
    rows = Counter()(ids).logits[0].double().log_softmax(-1)
    scores = [
        {"at": n + 1, "ids": list(range(10)), "logprobs": (row + off).tolist()} for n, row in enumerate(rows[:-1])
    ]
    return [{"tokens": tokens, "scores": scores}]


def failures(run: list[dict[str, Any]], bound: float = 0.1, never: tuple[int, ...] = ()) -> list[str]:
    return measure(run, [[0]], Reference(Counter), never=never).failures(bound, 3, 1)


def test_a_run_passes_within_its_bound() -> None:
    assert failures(said([1, 2, 3])) == []
    assert failures(said([1, 2, 3], off=0.09)) == []
    assert "off by 0.11" in failures(said([1, 2, 3], off=0.11))[0]
    assert "off by inf" in failures(said([1, 2, 3], off=float("nan")))[0]


def test_a_text_is_judged_behind_the_place_where_it_parts() -> None:
    """2 instead of 1 is behind by 1 in log-probability; what follows is transformers' own choice again."""
    found = measure(said([2, 3, 4]), [[0]], Reference(Counter))
    assert (found.written, found.same, found.margin) == (3, 2, pytest.approx(1))
    assert "less likely than another by 1" in failures(said([2, 3, 4]))[0]
    assert failures(said([2, 3, 4]), bound=0.51) == []
    assert failures(said([2, 3, 4]), never=(1,)) == []  # the engine never writes 1
    assert "2 tokens were written instead of 3" in failures(said([1, 2]))[0]


def test_two_answers_that_should_be_one() -> None:
    assert apart(said([1, 2, 3]), said([1, 2, 3])) == 0
    assert apart(said([1, 2, 3]), said([1, 2, 3], off=0.5)) == pytest.approx(0.5)
    assert apart(said([1, 2, 3]), said([1, 2, 4])) == float("inf")


# What is kept -----------------------------------------------------------------------------------------------------------


def test_the_page_shows_what_was_kept() -> None:
    text = PAGE.read_text(encoding="utf-8")
    written = text.split(BEGIN)[1].split(END)[0].strip()
    assert written == tables(json.loads(KEPT.read_text(encoding="utf-8"))).strip(), "run make test-engines"


def test_the_doctor_knows_every_run() -> None:
    assert set(engine_runs()) == {e.doctor for e in ENGINES.values()} <= {e.key for e in DOCTORS}
    for run in engine_runs().values():
        assert run.error <= run.bound
        assert run.folds >= 7
        assert set(run.profiles) <= PROFILES.keys()
        assert run.version in str(run)


# Environments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ENGINES, "openvino-convert"])
def test_requirements_are_pinned(name: str) -> None:
    lines = environments.requirements(name).read_text(encoding="utf-8").splitlines()
    assert all("==" in line for line in lines if not line.startswith("#"))


def test_what_cannot_be_had_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    wanted = tmp_path / "unheard-of.txt"
    wanted.write_text("unheard-of==1.0\n")
    monkeypatch.setattr(environments, "requirements", lambda name: wanted)
    with pytest.raises(Unavailable, match=r"pip cannot install unheard-of\.txt: ERROR: .*unheard-of==1\.0"):
        environments.environment("unheard-of")
    assert environments.existing("unheard-of") is None

    wanted.write_text("# nothing\n")
    python = environments.environment("unheard-of")
    assert python == environments.environment("unheard-of") == environments.existing("unheard-of")
    wanted.write_text("# something else\n")
    assert environments.existing("unheard-of") is None
