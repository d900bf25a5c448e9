"""Grids of learning rates that extend themselves: what is tried next, after a kill too, and what the report says."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rankfold.compare import experiment
from rankfold.compare.contenders import Entry, resolve
from rankfold.compare.experiment import compare
from rankfold.compare.file import Extension, parse
from rankfold.compare.rates import RateGrid
from rankfold.compare.statistics import analyse
from rankfold.compare.table import show
from rankfold.compare.trial_file import FILE, TrialLine, read
from rankfold.compare.wording import grid
from rankfold.errors import RankfoldError
from rankfold.plan.first_rate import beyond, rounded

Values = dict[str, Any]


def peak(at: float, diverges: float = math.inf) -> Callable[[TrialLine], TrialLine]:
    """Trials whose validation is best at a rate; from another on, training diverges."""

    def measured(line: TrialLine) -> TrialLine:
        if line.rate >= diverges:
            return replace(line, status="diverged", reason="nan", wall_seconds=1.0)
        value = 1 - abs(math.log10(line.rate / at)) / 10
        test = None if line.rung is not None else value - 0.01 * line.seed
        return replace(line, status="done", reason=None, validation=value, test=test, wall_seconds=1.0)

    return measured


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[float, int]]]:
    """Runs a comparison whose trials cost nothing; returns rates and seeds in the order in which they ran."""

    def run(
        values: Values, measured: Callable[[TrialLine], TrialLine], stop_after: int = 99, workers: int = 1
    ) -> list[tuple[float, int]]:
        ran: list[tuple[float, int]] = []

        @contextmanager
        def executor(*_: Any) -> Iterator[Callable[[Path, TrialLine], Future[TrialLine]]]:
            def submit(folder: Path, line: TrialLine) -> Future[TrialLine]:
                future: Future[TrialLine] = Future()
                if len(ran) >= stop_after:
                    future.set_exception(KeyboardInterrupt())
                else:
                    ran.append((line.rate, line.seed))
                    future.set_result(measured(line))
                return future

            yield submit

        monkeypatch.setattr(experiment, "executor", executor)
        try:
            compare(parse(values), say=lambda _: None, workers=workers)
        except KeyboardInterrupt:
            assert len(ran) >= stop_after
        return ran

    return run


def one(values: Values, **more: Any) -> Values:
    return values | {"methods": [{"name": "lora", "label": "LoRA", "r": 8, "lora_alpha": 16}], "rates": "auto"} | more


def test_it_goes_on_until_the_best_has_neighbours(values: Values, trials: Any):
    ran = trials(one(values, seeds=[0, 1], search_seeds=[0]), peak(2e-2))
    assert [rate for rate, seed in ran if seed == 0] == [5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2]
    assert [rate for rate, seed in ran if seed == 1] == [2e-2]  # the other seed at the best alone
    lines = read(Path(values["output"], FILE))
    assert [line.added for line in lines] == [0, 0, 0, 1, 2, 3, 4, 3]
    (c,) = analyse(lines).contenders
    assert (c.rate, c.sensitivity.edge, c.sensitivity.added) == (2e-2, None, 4)
    assert grid(c.sensitivity).endswith("0.02, 0.05; 4 of them added, as the best was at the edge")


def test_downwards_and_no_farther_than_asked(values: Values, trials: Any):
    ran = trials(one(values, rates={"extend": [1e-2], "most": 2}), peak(1e-5))
    assert [rate for rate, _ in ran] == [1e-2, 2e-2, 5e-3]  # of one rate, the larger side comes first
    analysis = analyse(read(Path(values["output"], FILE)))
    assert "is still at the edge of the grid (0.005, 0.01, 0.02; 2 of them added" in " ".join(analysis.warnings)
    assert "The best learning rate is the lowest" not in " ".join(analysis.warnings)
    assert [rate for rate, _ in trials(one(values, rates={"extend": [1e-2], "most": 4}), peak(1e-5))] == [2e-3, 1e-3]


def test_where_training_diverges_it_turns_back(values: Values, trials: Any):
    ran = trials(one(values), peak(1e-2, diverges=3e-3))
    assert [rate for rate, _ in ran] == [5e-4, 1e-3, 2e-3, 5e-3]
    (c,) = analyse(read(Path(values["output"], FILE))).contenders
    assert (c.rate, c.sensitivity.edge) == (2e-3, None)
    assert grid(c.sensitivity).endswith("no seed finished at 0.005")


def test_all_diverged_goes_down_and_all_failed_ends(values: Values, trials: Any, tmp_path: Path):
    ran = trials(one(values), peak(1e-5, diverges=3e-4))
    assert [rate for rate, _ in ran] == [5e-4, 1e-3, 2e-3, 2e-4, 1e-4, 5e-5, 2e-5, 1e-5, 5e-6]

    def failed(line: TrialLine) -> TrialLine:
        return replace(line, status="failed", reason="no memory", wall_seconds=1.0)

    assert len(trials(one(values, output=str(tmp_path / "other")), failed)) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_search_goes_on_where_it_stopped(values: Values, trials: Any, workers: int):
    whole = [*one(values, output=values["output"] + "-whole").items()]
    unbroken = trials(dict(whole), peak(1e-2))
    first = trials(one(values), peak(1e-2), stop_after=4, workers=workers)
    second = trials(one(values), peak(1e-2), workers=workers)
    assert first + second == unbroken
    assert trials(one(values), peak(1e-2)) == []  # the list of trials follows from the lines that are there


def test_halving_chooses_among_the_first_and_what_is_added_runs_to_its_end(values: Values, trials: Any):
    file = one(values, search={"halving": {"keep": 0.5, "rungs": 2}}, rates={"extend": [1e-3, 2e-3]})
    trials(file, peak(5e-3))
    lines = read(Path(values["output"], FILE))
    assert [(t.rate, t.rung) for t in lines] == [(1e-3, 0), (2e-3, 0), (2e-3, None), (5e-3, None), (1e-2, None)]


def test_each_contender_begins_at_a_rate_of_its_own(values: Values):
    lora = {"name": "lora", "r": 2}
    methods = [{**lora, "label": f"alpha {a}", "lora_alpha": a} for a in (1, 4, 64)]
    methods.append({**lora, "label": "given", "rates": [0.3]})
    methods.append({**lora, "label": "SGD", "optimizer": "sgd"})
    entries = resolve(parse(values | {"methods": methods, "rates": "auto"})).entries
    middles = [e.grid.first[1] for e in entries[:3] if e.grid]
    assert middles == sorted(middles, reverse=True)
    assert len(set(middles)) == 3
    assert entries[3].grid == RateGrid([0.3])
    assert "'sgd' is neither AdamW nor one of `rankfold optimizers`" in str(entries[4].reason)


def test_a_new_label_is_that_of_rates_that_are_no_longer_asked_for(values: Values, trials: Any):
    values = one(values, rates=[1e-3, 2e-3, 5e-3])
    trials(values, peak(2e-3))
    again = values | {"methods": [{**values["methods"][0], "label": "LoRA, r 8"}], "rates": [1e-3, 2e-3]}
    assert trials(again, peak(2e-3)) == []
    lines = read(values["output"])
    assert {(line.label, line.rate) for line in lines} == {("LoRA, r 8", rate) for rate in (1e-3, 2e-3, 5e-3)}
    assert [c.name for c in analyse(lines).contenders] == ["LoRA, r 8"]


def test_the_file(values: Values):
    file = parse(one(values))
    assert file.rates == Extension(extend="auto")
    assert parse({key: value for key, value in one(values).items() if key != "rates"}).rates == file.rates
    assert parse(one(values), ["rates=[1e-3]"]).rates == [1e-3]
    for wrong, message in (
        ({"extend": [0.0]}, r"rates\.extend: 0 must be greater than 0"),
        ({"extend": "up"}, r"rates: .*extend"),
        ("best", r"rates: .*list of a number"),
        ({"extend": "auto", "most": 0}, "most|rates"),
    ):
        with pytest.raises(RankfoldError, match=message):
            parse(one(values, rates=wrong))


def test_the_series():
    rate = 1e-4
    for expected in (2e-4, 5e-4, 1e-3, 2e-3):
        rate = beyond(rate, up=True)
        assert rate == expected
    assert beyond(1e-3, up=False) == 5e-4
    assert beyond(0.9999e-3, up=True) == 1e-3
    assert [rounded(x) for x in (1.4e-3, 1.5e-3, 3.2e-3, 8e-3, 1.0)] == [1e-3, 2e-3, 5e-3, 1e-2, 1.0]
    assert RateGrid([1e-3], 0).following([1e-3], [1e-3], diverged=False) is None


def test_the_terminal_says_which_rates(values: Values, trials: Any):
    from rich.console import Console

    trials(one(values), peak(1e-2))
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(show(analyse(read(Path(values["output"], FILE)))))
    assert "rates tried with LoRA: 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02; 3 of them added" in console.export_text()


def test_entries_without_a_grid_have_the_files(values: Values):
    from rankfold.compare.trial_list import wanted

    found, _ = wanted(Entry("x", "all", {"name": "lora"}), parse(one(values)), {})
    assert [t.line.rate for t in found] == [1e-3]


def test_a_dry_run_names_the_first_rates(values: Values, capsys: pytest.CaptureFixture[str]):
    from rankfold.commands.compare import print_plan

    file = parse(one(values, seeds=[0, 1], search_seeds=[0]))
    print_plan(resolve(file), file)
    said = " ".join(capsys.readouterr().out.split())
    assert "at least 4 trials of at most 8 steps" in said
    assert "0.0005, 0.001, 0.002 and beyond" in said
