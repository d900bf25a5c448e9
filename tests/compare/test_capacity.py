"""The third part of the evidence page: its compare files are good, its page can be written before and after they are run."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from synthetic import METHODS, lines
from tiny import byte_tokenizer
from transformers import AutoModelForCausalLM

from rankfold.compare.file import Extension, parse

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BUDGETS = (1, 2, 8)


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made  # dataclasses look their module up
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize("n", BUDGETS)
def test_the_files(n: int):
    values = yaml.safe_load((BENCHMARKS / f"evidence-capacity-{n}.yaml").read_text())
    values["methods"] = [m for m in values["methods"] if m["name"] != "cora"]  # whose basis has to be made first
    file = parse(values)
    assert isinstance(file.rates, Extension)
    assert all(c.rates is None or isinstance(c.rates, Extension) for c in file.methods)
    assert file.choosing_seeds == [0]
    assert len(file.seeds) == 3
    assert {"lora", "rasa"} <= {c.name for c in file.methods}
    assert 305_280 * n < int(str(file.budget)) < 305_280 * n * 1.03


def test_the_page_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    evidence = module("evidence")
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    (tmp_path / "evidence.jsonl").write_text((BENCHMARKS / "results" / "evidence.jsonl").read_text())
    assert "capacity" not in evidence.page(tmp_path, evidence.analysed(tmp_path))
    found = [replace(t, added=0) for t in lines(METHODS[:2], rates=(1e-3, 2e-3, 5e-3), rows=60)]
    (tmp_path / "evidence-capacity-1.jsonl").write_text("".join(t.to_json() + "\n" for t in found))
    error = {
        "id": "a",
        "label": "LoRA",
        "rate": 2e-3,
        "words": 1000,
        "loss": 0.6,
        "token_accuracy": 0.7,
        "reviews_loss": 3.5,
    }
    errors = [error | {"seed": s, "phoneme_error": e} for s, e in ((0, 0.2), (1, 0.3))]
    errors.append(
        error | {"label": "no adapter", "rate": None, "seed": None, "phoneme_error": 0.9, "reviews_loss": 3.2}
    )
    (tmp_path / "evidence-capacity-1-errors.jsonl").write_text("".join(json.dumps(e) + "\n" for e in errors))
    text = evidence.page(tmp_path, evidence.analysed(tmp_path))
    assert "learning rates LoRA r=8 (PEFT) 0.001, 0.002, 0.005; RaSA r=8, k=1 0.001, 0.002, 0.005 (chosen on" in text
    assert "| LoRA | 2 | 0.2500 | 0.2000, 0.3000 | 0.6000 | 0.7000 | 3.5000 |" in text
    assert "| no adapter | – | 0.9000 | 0.9000 | 0.6000 | 0.7000 | 3.2000 |" in text


def test_the_budgets_beside_each_other(tmp_path: Path):
    evidence = module("evidence")
    (tmp_path / "evidence.jsonl").write_text((BENCHMARKS / "results" / "evidence.jsonl").read_text())
    for n, methods in ((1, METHODS[:2]), (8, METHODS[1:3])):
        found = lines(methods, rates=(1e-3, 2e-3, 5e-3), rows=60)
        (tmp_path / f"evidence-capacity-{n}.jsonl").write_text("".join(t.to_json() + "\n" for t in found))
    analyses = evidence.analysed(tmp_path)
    text = evidence.across(analyses)
    assert text in evidence.page(tmp_path, analyses)
    assert "| contender | r = 1 | r = 8 |" in text
    (first, both, last) = (m.label for m in METHODS[:3])
    row = {line.split(" | ")[0]: line.split(" | ")[1:] for line in text.splitlines()}
    assert row[f"| {first}"][1].startswith("–")
    assert row[f"| {last}"][0].startswith("–")
    assert not any(cell.startswith("–") for cell in row[f"| {both}"])


def test_phoneme_errors(llama: Path):
    measure = module("phoneme_errors")
    assert measure.edit_distance(["K", "AE", "T"], ["K", "AH", "T", "S"]) == 2
    assert measure.edit_distance([], ["K"]) == 1
    found = lines(METHODS[:1], rates=(1e-3, 2e-3), seeds=(0,), rows=20)
    (chosen,) = measure.chosen(found)
    assert chosen.rate == 2e-3
    tokenizer = byte_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    rows = {"prompt": ["d o g s :", "c a t :"], "completion": [" D AO G Z", " K AE T"]}
    reviews = ["a film", "the film is long"]
    assert measure.phoneme_error(model, tokenizer, rows) > 0
    # The loss of plain texts is per token, whatever is padded beside them
    counts = [len(tokenizer(text)["input_ids"]) - 1 for text in reviews]
    each = [measure.reviews_loss(model, tokenizer, [text]) for text in reviews]
    mean = sum(n * loss for n, loss in zip(counts, each, strict=True)) / sum(counts)
    assert measure.reviews_loss(model, tokenizer, reviews) == pytest.approx(mean, rel=1e-5)


def test_a_speaker_that_knows_the_words(monkeypatch: pytest.MonkeyPatch):
    measure = module("phoneme_errors")
    rows = {"prompt": ["d o g s :", "c a t :"], "completion": [" D AO G Z", " K AE T"]}
    says = {"d o g s :": ["D", "AO", "G"], "c a t :": ["K", "AE", "T"]}
    monkeypatch.setattr(measure, "spoken", lambda model, tokenizer, prompts: [says[p] for p in prompts])
    assert measure.phoneme_error(None, None, rows) == 1 / 7


def test_what_the_trials_measured(tmp_path: Path):
    measure = module("phoneme_errors")
    done = [replace(t, before=0.1) for t in lines(METHODS[:1], rates=(1e-3,), seeds=(0, 1), rows=20)]
    for number, line in enumerate(done):
        line.run["output"] = str(tmp_path / str(number))
        (tmp_path / str(number)).mkdir()
        rows = [{"step": 0, "test_loss": 5.0}, {"step": 8, "loss": 1.0}, {"step": 8, "test_loss": 0.5}]
        (tmp_path / str(number) / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[1 - number :]))
    (tmp_path / "trials.jsonl").write_text("".join(t.to_json() + "\n" for t in done))
    assert measure.logged(tmp_path, done[0]) == (0.5, done[0].test)
    assert measure.logged(tmp_path, None) == (5.0, 0.1)  # the second trial's: the first did not measure it again
