"""What a compare file may say, and how it is told what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rankfold.cli import main
from rankfold.compare.file import load, number, parse
from rankfold.compare.template import template
from rankfold.runfile.problems import RunFileError

Values = dict[str, Any]


def problems(values: Values, *overrides: str) -> str:
    with pytest.raises(RunFileError) as e:
        parse(values, overrides)
    return str(e.value)


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_the_template_is_valid(task: Any, tmp_path: Path):
    path = tmp_path / "compare.yaml"
    assert main(["init", str(path), "--compare", "--task", task]) == 0
    file = load(path)
    assert file.labels() == ["LoRA", "RaSA"]
    assert path.read_text() == template(task)


def test_the_example_is_the_template():
    assert (Path(__file__).parents[2] / "examples" / "compare.yaml").read_text() == template()


def test_what_is_written_is_what_was_read(values: Values, tmp_path: Path):
    file = parse(values | {"where": {"first": {"layers": "first third"}}, "search": "halving"})
    path = tmp_path / "again.yaml"
    path.write_text(file.to_yaml())
    assert load(path) == file


def test_short_forms(values: Values):
    file = parse(values | {"methods": ["rasa", {"name": "lora", "r": 4}, {"name": "lora", "r": 2}], "budget": "none"})
    assert file.labels() == ["rasa", "lora r=4", "lora r=2"]
    assert file.budget is None
    assert (file.data.seed, file.training.keep_best) == (0, False)
    assert parse(values, ["rates=[1e-3, 2e-3]", "training.max_steps=3"]).rates == [1e-3, 2e-3]


def test_lines_and_names(values: Values, tmp_path: Path):
    path = tmp_path / "compare.yaml"
    values |= {"methods": ["rasa", {"name": "sora", "treshold": 1.0}, 3], "seeds": [0, 0]}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(RunFileError, match=r"methods.2: 3 is neither a method's name nor"):
        load(path)
    values["methods"].pop()
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(RunFileError) as e:
        load(path)
    at = 1 + next(i for i, line in enumerate(path.read_text().splitlines()) if line.startswith("seeds"))
    assert str(e.value) == f"{path}:{at}: seeds: 0 stands there twice"
    values["seeds"] = [0]
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(RunFileError) as e:
        load(path)
    at = 1 + next(i for i, line in enumerate(path.read_text().splitlines()) if "treshold" in line)
    assert str(e.value).startswith(
        f"{path}:{at}: methods.1.treshold: 'sora' has no such field (value 1.0); did you mean 'threshold'?"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rates": []}, "rates: "),
        ({"rates": [-1.0]}, "rates: -1 must be greater than 0"),
        ({"rate": [1.0]}, "rate: unknown key (value [1.0]); did you mean 'rates'?"),
        ({"methods": ["loar"]}, "methods.0.name: "),
        ({"methods": ["rasa", "rasa"]}, "methods.1: another contender is called 'rasa' too"),
        ({"training": {"learning_rate": 1e-3}}, "training.learning_rate: comes from rates; remove it here"),
        ({"training": {"seed": 1}}, "training.seed: comes from seeds"),
        ({"training": {"metric": "bleu"}}, "training.metric: 'bleu' is not a metric of classification"),
        ({"training": {"early_stopping": 2, "keep_best": True}, "search": "halving"}, "contradicts search: halving"),
        ({"budget": "much"}, "budget: 'much' is not a number of parameters"),
        ({"budget": 0}, "budget: '0' is not a number of parameters"),
        ({"budget": {"of": {"name": "lora", "rank": 8}}}, "budget.of.rank: 'lora' has no such field"),
        ({"budget": {"off": {"name": "lora"}}}, "budget: "),
        ({"where": {"all": {"layer": [1]}}}, "where.all.layer: unknown key (value [1]); did you mean 'layers'?"),
        ({"where": {"all": {"layers": []}}}, "where.all.layers: is empty"),
        ({"where": {"all": {"layers": "first half"}}}, "where.all.layers: 'first half' is not "),
        ({"methods": ["peft:ln_tuning"], "where": {"a": {"layers": [0]}}}, "has no field layers_to_transform"),
        ({"search": "random"}, "search: 'random' is not 'grid' or a mapping"),
        ({"search": {"halving": {"keep": 2.0}}}, "search: "),
        ({"search_seeds": [7]}, "search_seeds: 7 is not one of seeds (0)"),
        ({"seeds": [-1]}, "seeds.0: -1 is not allowed"),
        ({"methods": "rasa"}, "methods: 'rasa' is not a list"),
        ({"methods": None}, "methods: required but missing: Who competes"),
    ],
)  # fmt: skip
def test_one_clear_line(values: Values, change: Values, message: str):
    text = problems(values | change)
    assert message in text
    assert text.count("\n") == 0


def test_numbers():
    assert [number(n) for n in (1200, "1.2M", "300k", "1_000", "2,000")] == [1200, 1_200_000, 300_000, 1000, 2000]
