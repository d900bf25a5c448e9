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
    assert file.rates == Extension(extend="auto")
    assert file.choosing_seeds == [0]
    assert len(file.seeds) == 3
    assert {c.name for c in file.methods} == {"lora", "rasa", "sora", "adalora", "cola", "xgblora"}
    assert 305_280 * n < int(str(file.budget)) < 305_280 * n * 1.03


def test_the_page_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    evidence = module("evidence")
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    (tmp_path / "evidence.jsonl").write_text((BENCHMARKS / "results" / "evidence.jsonl").read_text())
    text = evidence.page(tmp_path, evidence.analysed(tmp_path))
    assert text.count("**Not run yet.**") == 3
    assert "10 contenders at a budget of 312,000 trained parameters" in text
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
    assert text.count("**Not run yet.**") == 2
    assert "learning rates LoRA r=8 (PEFT) 0.001, 0.002, 0.005; RaSA r=8, k=1 0.001, 0.002, 0.005 (chosen on" in text
    assert "| LoRA | 2 | 0.2500 | 0.2000, 0.3000 | 0.6000 | 0.7000 | 3.5000 |" in text
    assert "| no adapter | – | 0.9000 | 0.9000 | 0.6000 | 0.7000 | 3.2000 |" in text


def test_phoneme_errors(llama: Path):
    measure = module("phoneme_errors")
    assert measure.edit_distance(["K", "AE", "T"], ["K", "AH", "T", "S"]) == 2
    assert measure.edit_distance([], ["K"]) == 1
    found = lines(METHODS[:1], rates=(1e-3, 2e-3), seeds=(0,), rows=20)
    (chosen,) = measure.chosen(found)
    assert chosen.rate == 2e-3
    tokenizer = byte_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    rows = {"prompt": ["c a t :", "d o g s :"], "completion": [" K AE T", " D AO G Z"]}
    reviews = ["a film", "the film is long"]
    result = measure.measure(chosen, model, tokenizer, rows, reviews)
    assert (result.words, result.label) == (2, chosen.label)
    assert measure.measure(None, model, tokenizer, rows, reviews).label == "no adapter"
    # The loss of plain texts is per token, whatever is padded beside them
    counts = [len(tokenizer(text)["input_ids"]) - 1 for text in reviews]
    each = [measure.reviews_loss(model, tokenizer, [text]) for text in reviews]
    mean = sum(n * loss for n, loss in zip(counts, each, strict=True)) / sum(counts)
    assert result.reviews_loss == pytest.approx(mean, rel=1e-5)
    # A row of its own gives what it gives in a batch with padding
    logits, targets = measure.predicted(model, tokenizer, rows["prompt"], rows["completion"])
    alone, same = measure.predicted(model, tokenizer, rows["prompt"][:1], rows["completion"][:1])
    assert tokenizer.decode(same) == " K AE T</s>"
    assert targets[: len(same)].equal(same)
    assert logits[: len(same)].allclose(alone, atol=1e-5)
    assert 0 <= result.token_accuracy <= 1
    assert result.loss > 0
    assert result.phoneme_error > 0
