"""The third part of the evidence page: its compare files are good, its page can be written before and after they are run."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
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
    assert "learning rates of each contender's own, with more until the best lies inside (chosen on" in text
    assert "| 0.002 of 0.001, 0.002, 0.005 |" in text
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
    assert measure.phoneme_error(model, tokenizer, rows) > 0
    # The loss is per token, whatever is padded beside it, and of a text that begins with a prompt it is that of the rest
    texts, prompts = ["a film", "the film is long"], ["a f", "the"]
    counts = [len(tokenizer(text)["input_ids"]) - 1 for text in texts]
    each = [measure.mean_loss(model, tokenizer, [text]) for text in texts]
    mean = sum(n * loss for n, loss in zip(counts, each, strict=True)) / sum(counts)
    assert measure.mean_loss(model, tokenizer, texts) == pytest.approx(mean, rel=1e-5)
    before = [len(tokenizer(prompt)["input_ids"]) - 1 for prompt in prompts]
    of_prompts = [measure.mean_loss(model, tokenizer, [prompt]) for prompt in prompts]
    rest = sum(n * loss for n, loss in zip(counts, each, strict=True)) - sum(
        n * loss for n, loss in zip(before, of_prompts, strict=True)
    )
    expected = rest / (sum(counts) - sum(before))
    assert measure.mean_loss(model, tokenizer, texts, prompts) == pytest.approx(expected, rel=1e-5)


def test_what_is_spoken_is_what_transformers_generates(llama: Path):
    """What has ended is not computed any more, and the other rows go on as if alone."""
    measure = module("phoneme_errors")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    with torch.no_grad():
        model.lm_head.weight[tokenizer("\n")["input_ids"][0]] *= 3  # so that some rows soon end
    prompts = ["d o g s :", "c a t :", "a :", "x y z z y :"]
    found = measure.spoken(model, tokenizer, prompts)
    for prompt, said in zip(prompts, found, strict=True):
        batch = tokenizer(prompt, return_tensors="pt")
        options = {"max_new_tokens": measure.LONGEST, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
        out = model.generate(**batch, **options)[0, batch["input_ids"].shape[1] :]
        assert said == tokenizer.decode(out, skip_special_tokens=True).split("\n")[0].split()


def test_a_speaker_that_knows_the_words(monkeypatch: pytest.MonkeyPatch):
    measure = module("phoneme_errors")
    rows = {"prompt": ["d o g s :", "c a t :"], "completion": [" D AO G Z", " K AE T"]}
    says = {"d o g s :": ["D", "AO", "G"], "c a t :": ["K", "AE", "T"]}
    monkeypatch.setattr(measure, "spoken", lambda model, tokenizer, prompts: [says[p] for p in prompts])
    assert measure.phoneme_error(None, None, rows) == 1 / 7


def test_what_the_trials_measured(tmp_path: Path):
    measure = module("phoneme_errors")
    done = lines(METHODS[:1], rates=(1e-3,), seeds=(0, 1), rows=20)
    done = [replace(t, before=before) for t, before in zip(done, (None, 0.1), strict=True)]
    (tmp_path / "trials.jsonl").write_text("".join(t.to_json() + "\n" for t in done))
    assert measure.token_accuracy(tmp_path, done[0]) == done[0].test
    assert measure.token_accuracy(tmp_path, None) == 0.1
