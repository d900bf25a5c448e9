"""Phoneme error, loss and token accuracy of the adapters that a comparison on `phonemes` chose, on 1,000 test words.

    python benchmarks/phoneme_errors.py 1 2 8          # of runs/evidence-capacity-N; what is measured already is not repeated

One line per adapter, in results/evidence-capacity-N-errors.jsonl, which the page of evidence reads.
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
MODEL, WORDS, BATCH, LONGEST = "smollm2-135m-instruct", 1000, 50, 48


@dataclass(frozen=True)
class Errors:
    """Of one trained adapter, on the same words for all.

    Args:
        phoneme_error: edit distance between spoken (greedy) and true phonemes, over the number of true ones.
        loss, token_accuracy: over the tokens of the true phonemes.
    """

    id: str
    label: str
    rate: float
    seed: int
    words: int
    phoneme_error: float
    loss: float
    token_accuracy: float


def chosen(lines: list[TrialLine]) -> list[TrialLine]:
    """The finished trials of each contender at its best rate."""
    best = {(c.label, c.where): c.rate for c in analyse(lines).contenders}
    return [t for t in lines if t.status == "done" and t.rung is None and best.get((t.label, t.where)) == t.rate]


def measure(line: TrialLine, model: Any, tokenizer: Any, rows: dict[str, list[str]]) -> Errors:
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
    return Errors(line.id, line.label, line.rate, line.seed, len(rows["prompt"]), wrong / phonemes, loss / tokens, right / tokens)  # fmt: skip


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
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = assets.dataset("phonemes")["test"].select(range(WORDS))[:]
    for n in parser.parse_args().budgets:
        out, results = Path(f"runs/evidence-capacity-{n}"), HERE / "results" / f"evidence-capacity-{n}-errors.jsonl"
        done = {values["id"] for _, values in read_json_lines(results) if isinstance(values, dict)}
        for line in chosen(read(out)):
            if line.id in done or line.adapter is None:
                continue
            plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            model = PeftModel.from_pretrained(plain, str(out / line.adapter)).eval()
            found = measure(line, model, tokenizer, rows)
            append_line(results, json.dumps(dataclasses.asdict(found)))
            print(found)


if __name__ == "__main__":
    main()
