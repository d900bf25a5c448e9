"""What the adapters that a comparison on `phonemes` chose have learnt and forgotten.

    python benchmarks/phoneme_errors.py 1 2 8          # of runs/evidence-capacity-N; what is measured already is not repeated

Learnt: phoneme error, loss and token accuracy on 1,000 test words. Forgotten: the loss on 300 film reviews, which are plain English
and no part of the training, beside the loss of the model without an adapter. One line per adapter, and one without, in
results/evidence-capacity-N-errors.jsonl, which the page of evidence reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankfold.compare.statistics import analyse
from rankfold.compare.trial_file import TrialLine, read
from rankfold.io import assets
from rankfold.io.files import append_line, read_json_lines

HERE = Path(__file__).parent
MODEL, WORDS, REVIEWS, BATCH, LONGEST = "smollm2-135m-instruct", 1000, 300, 50, 48
BASE = "no adapter"


@dataclass(frozen=True)
class Errors:
    """Of one trained adapter, on the same words and reviews for all.

    Args:
        label: the contender's; `BASE` for the model without an adapter.
        phoneme_error: edit distance between spoken (greedy) and true phonemes, over the number of true ones.
        loss, token_accuracy: over the tokens of the true phonemes.
        reviews_loss: mean over the tokens of the film reviews.
    """

    id: str
    label: str
    rate: float | None
    seed: int | None
    words: int
    phoneme_error: float
    loss: float
    token_accuracy: float
    reviews_loss: float


def chosen(lines: list[TrialLine]) -> list[TrialLine]:
    """The finished trials of each contender at its best rate."""
    best = {(c.label, c.where): c.rate for c in analyse(lines).contenders}
    return [t for t in lines if t.status == "done" and t.rung is None and best.get((t.label, t.where)) == t.rate]


def measure(
    line: TrialLine | None, model: Any, tokenizer: Any, rows: dict[str, list[str]], reviews: list[str]
) -> Errors:
    """Of the adapter of this trial, which `model` carries; None: it carries none."""
    wrong = phonemes = right = tokens = 0
    loss = 0.0
    for i in range(0, len(rows["prompt"]), BATCH):
        prompts, truths = rows["prompt"][i : i + BATCH], rows["completion"][i : i + BATCH]
        for guess, truth in zip(spoken(model, tokenizer, prompts), truths, strict=True):
            wrong += edit_distance(guess, truth.split())
            phonemes += len(truth.split())
        logits, targets = predicted(model, tokenizer, prompts, truths)
        right += int((logits.argmax(-1) == targets).sum())
        loss += float(torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum"))
        tokens += len(targets)
    named = (line.id, line.label, line.rate, line.seed) if line else (BASE, BASE, None, None)
    forgotten = reviews_loss(model, tokenizer, reviews)
    return Errors(*named, len(rows["prompt"]), wrong / phonemes, loss / tokens, right / tokens, forgotten)


@torch.no_grad()
def reviews_loss(model: Any, tokenizer: Any, reviews: list[str]) -> float:
    """Mean over all tokens that have one before them."""
    total, count = 0.0, 0
    for i in range(0, len(reviews), BATCH):
        batch = tokenizer(reviews[i : i + BATCH], padding=True, truncation=True, max_length=64, return_tensors="pt")
        asked = batch["attention_mask"][:, 1:].bool()
        logits = model(**batch).logits[:, :-1][asked]
        total += float(
            torch.nn.functional.cross_entropy(logits.float(), batch["input_ids"][:, 1:][asked], reduction="sum")
        )
        count += int(asked.sum())
    return total / count


@torch.no_grad()
def spoken(model: Any, tokenizer: Any, prompts: list[str]) -> list[list[str]]:
    """The phonemes that greedy decoding says, up to the end of the line."""
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=LONGEST, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.split("\n")[0].split() for text in texts]


@torch.no_grad()
def predicted(model: Any, tokenizer: Any, prompts: list[str], truths: list[str]) -> tuple[Tensor, Tensor]:
    """Logits at the positions of the completions' tokens, and these tokens; the end of the text counts."""
    ids = [tokenizer(p)["input_ids"] for p in prompts]
    ends = [tokenizer(t, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for t in truths]
    longest = max(len(a) + len(b) for a, b in zip(ids, ends, strict=True))
    batch = torch.full((len(ids), longest), tokenizer.eos_token_id)
    mask, asked = torch.zeros_like(batch), torch.zeros_like(batch, dtype=torch.bool)
    for i, (a, b) in enumerate(zip(ids, ends, strict=True)):
        batch[i, : len(a) + len(b)] = torch.tensor(a + b)
        mask[i, : len(a) + len(b)] = 1
        asked[i, len(a) : len(a) + len(b)] = True
    logits = model(input_ids=batch, attention_mask=mask).logits[:, :-1]
    return logits[asked[:, 1:]], batch[:, 1:][asked[:, 1:]]


def edit_distance(a: list[str], b: list[str]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("budgets", nargs="+", type=int, help="ranks of the LoRA whose budget it is")
    base = assets.model_path(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right")
    rows = assets.dataset("phonemes")["test"].select(range(WORDS))[:]
    reviews = assets.dataset("movie-reviews")["test"].select(range(REVIEWS))["text"]
    for n in parser.parse_args().budgets:
        out, results = Path(f"runs/evidence-capacity-{n}"), HERE / "results" / f"evidence-capacity-{n}-errors.jsonl"
        done = {values["id"] for _, values in read_json_lines(results) if isinstance(values, dict)}
        for line in [None, *chosen(read(out))]:
            if (line.id if line else BASE) in done or (line and line.adapter is None):
                continue
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            if line:
                model = PeftModel.from_pretrained(model, str(out / str(line.adapter)))
            found = measure(line, model.eval(), tokenizer, rows, list(reviews))
            append_line(results, json.dumps(dataclasses.asdict(found)))
            print(found, flush=True)


if __name__ == "__main__":
    main()
