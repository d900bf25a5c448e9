"""The optimiser as part of a contender: labels, rates, ids, refusals, and one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rankfold.commands.compare import print_plan, print_report
from rankfold.compare.contenders import Entry, resolve
from rankfold.compare.experiment import check_labels, compare
from rankfold.compare.file import parse
from rankfold.compare.rates import RateGrid
from rankfold.compare.statistics import analyse
from rankfold.compare.trial_file import read
from rankfold.compare.trial_list import make, wanted
from rankfold.runfile.problems import RunFileError
from rankfold.train.folder import FolderError

Values = dict[str, Any]
RITE = {"name": "peft:lora", "r": 2, "optimizer": "lora_rite", "optimizer_options": {"escape": False}, "rates": [0.02, 0.2]}  # fmt: skip


def silent(sentence: str) -> None:
    pass


def with_methods(values: Values, *methods: Values) -> Values:
    return {**values, "methods": list(methods)}


def test_one_table(values: Values, here: list[str], capsys: pytest.CaptureFixture[str]):
    lora = {"name": "peft:lora", "r": 2}
    values = with_methods(
        values, lora, RITE, {"name": "rasa", "r": 2, "shared_rank": 1}, {**lora, "optimizer": "lora_fa"}
    )
    file = parse(values)
    assert file.labels() == ["peft:lora", "lora_rite on peft:lora", "rasa", "lora_fa on peft:lora"]
    lineup = resolve(file)
    found = {e.label: e for e in lineup.entries}
    assert found["lora_rite on peft:lora"].trained == found["peft:lora"].trained
    assert 0 < (found["lora_fa on peft:lora"].trained or 0) < (found["peft:lora"].trained or 0)
    print_plan(lineup, file)
    assert "optimizer lora_rite" in " ".join(capsys.readouterr().out.split())
    compare(file, say=silent)
    lines = read(values["output"])
    assert [(line.label, line.rate, line.status) for line in lines] == [
        ("peft:lora", 0.01, "done"), ("lora_rite on peft:lora", 0.02, "done"), ("rasa", 0.01, "done"),
        ("lora_fa on peft:lora", 0.01, "done"), ("lora_rite on peft:lora", 0.2, "done"),
    ]  # fmt: skip
    assert lines[1].training == {"optimizer": "lora_rite", "optimizer_options": {"escape": False}}
    assert lines[1].run["training"]["optimizer"] == "lora_rite"
    assert lines[3].parameters["trained"] == found["lora_fa on peft:lora"].trained
    result = analyse(lines)
    assert result.reference == "peft:lora"
    assert not any("share" in warning for warning in result.warnings)
    print_report(Path(values["output"]))
    assert "lora_rite on peft:lora" in Path(values["output"], "report.html").read_text(encoding="utf-8")
    assert len(here) == 5
    compare(file, say=silent)
    assert len(here) == 5


def test_ids(values: Values):
    file = parse(values)
    method = {"name": "peft:lora", "r": 2}
    plain = make(Entry("x", "all", method), file, 0.01, 0, 1.0, 0.0).id
    options: list[Values] = [
        {},
        {"optimizer": "lora_rite"},
        {"optimizer": "lora_rite", "optimizer_options": {"clip": 0.5}},
    ]
    ids = [make(Entry("x", "all", method, training=o), file, 0.01, 0, 1.0, 0.0).id for o in options]
    assert ids[0] == plain
    assert len(set(ids)) == 3


def test_rates_of_its_own(values: Values):
    entry = Entry("x", "all", {"name": "peft:lora"}, grid=RateGrid([0.1, 0.2, 0.3]))
    trials, _ = wanted(entry, parse(values), {})
    assert [t.line.rate for t in trials] == [0.1, 0.2, 0.3]


def test_the_same_with_another_optimizer_needs_another_label(values: Values, here: list[str]):
    lora = {"name": "peft:lora", "r": 2, "label": "LoRA"}
    compare(parse(with_methods(values, lora)), say=silent)
    file = parse(with_methods(values, {**lora, "optimizer": "riemannian"}))
    with pytest.raises(
        FolderError, match=r"'LoRA' was another one .*optimizer was None, is 'riemannian'.*another label"
    ):
        check_labels(resolve(file), file, read(values["output"]))


def test_what_cannot_be_trained(values: Values):
    file = parse(
        with_methods(values, {"name": "peft:lora", "r": 2}, {"name": "peft:vera", "r": 4, "optimizer": "lora_pro"})
    )
    lora, vera = resolve(file).entries
    assert lora.reason is None
    assert "has no trainable pair" in str(vera.reason)


@pytest.mark.parametrize(
    ("contender", "says"),
    [
        ({"optimizer": "lora_rit"}, r"methods\.0\.optimizer: unknown optimizer 'lora_rit'; did you mean 'lora_rite'"),
        ({**RITE, "optimizer_options": {"clp": 1}}, r"methods\.0\.optimizer_options\.clp: LoraRite: option clp=1 is not known"),
        ({"rates": [0.1, 0.1]}, r"methods\.0\.rates: 0\.1 stands there twice"),
        ({"rates": [-1.0]}, r"methods\.0\.rates: -1 must be greater than 0"),
        ({"name": "adalora", "r": 4, "target_r": 2, "optimizer": "lora_rite"}, r"methods\.0\.optimizer: 'lora_rite' cannot train AdaLoRA"),
    ],
)  # fmt: skip
def test_wrong_contenders(values: Values, contender: Values, says: str):
    with pytest.raises(RunFileError, match=says):
        parse(with_methods(values, {"name": "peft:lora", "r": 2, **contender}))


def test_a_folder_of_before_is_continued(values: Values, here: list[str]):
    """An earlier version wrote the default of max_grad_norm as 1."""
    file = parse(values)
    compare(file, say=silent)
    copy = Path(values["output"], "compare.yaml")
    copy.write_text(copy.read_text().replace("training:\n", "training:\n  max_grad_norm: 1.0\n"))
    ran = len(here)
    compare(file, say=silent)
    assert len(here) == ran
