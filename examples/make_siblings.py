"""Sibling models, made honestly: the bundled base fine-tuned on several real tasks with rankfold, each merged and saved.

    python examples/make_siblings.py --out siblings              (a few minutes on two cores)
    rankfold subspace siblings/* -o bases/qkv.safetensors --targets query,key,value
    python examples/make_siblings.py --out siblings --basis bases/all.safetensors     (both at once, for all linear layers)

CoRA needs models that were tuned from one base for different tasks. These are film reviews (VADER's corpus) and four
questions about the sound of a spelt word, whose answers are in the CMU dictionary. To measure CoRA on one of the tasks,
leave its sibling out of the subspace: with it, the basis has seen the answer.

A task whose folder is there is skipped, so a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from peft import PeftModel

from rankfold.commands.quiet import quiet
from rankfold.io import assets as bundled
from rankfold.io.files import whole_folder
from rankfold.io.models import locate
from rankfold.methods.cora_subspace import build_subspace
from rankfold.runfile.load import parse
from rankfold.train.model import load_config, load_model, load_tokenizer
from rankfold.train.run import train

KINDS = {
    "vowel": "aa ae ah ao aw ay eh er ey ih iy ow oy uh uw",
    "stop": "b d g k p t",
    "fricative": "ch dh f hh jh s sh th v z zh",
    "sonorant": "l m n ng r w y",
}
KIND = {sound: kind for kind, sounds in KINDS.items() for sound in sounds.split()}


def syllables(letters: list[str], sounds: list[str]) -> str:
    """How many: a syllable has one vowel."""
    return str(min(max(sum(KIND[s] == "vowel" for s in sounds), 1), 4))


def extra_letters(letters: list[str], sounds: list[str]) -> str:
    """How many more letters than sounds, as in `t h r o u g h`."""
    return str(min(max(len(letters) - len(sounds), 0), 3))


QUESTIONS: dict[str, Callable[[list[str], list[str]], str]] = {
    "syllables": syllables,
    "first-sound": lambda letters, sounds: KIND[sounds[0]],
    "last-sound": lambda letters, sounds: KIND[sounds[-1]],
    "extra-letters": extra_letters,
}
LINEAR = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
TASKS = ("movie-reviews", *QUESTIONS)


def write_rows(task: str, folder: Path) -> None:
    """Spelt words (`c a t`) and the answer to the task's question, from the bundled pronunciations."""
    folder.mkdir()
    for split, rows in bundled.dataset("phonemes").items():
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for prompt, completion in zip(rows["prompt"], rows["completion"], strict=True):
                letters = prompt.splitlines()[0].removeprefix("Word: ")
                answer = QUESTIONS[task](letters.split(), completion.split())
                file.write(json.dumps({"text": letters, "label": answer}) + "\n")


def make(task: str, folder: Path, work: Path, arguments: argparse.Namespace) -> str:
    """Trains one sibling in `work` and saves it to `folder`; returns its score in words."""
    source = task
    if task in QUESTIONS:
        source = str(work / "data")
        write_rows(task, Path(source))
    run = parse(
        {
            "model": arguments.model,
            "task": "classification",
            "data": {
                "source": source,
                "max_length": 64,
                "max_train": arguments.rows,
                "max_validation": 500,
                "max_test": 1000,
            },
            "method": {"name": arguments.method, "r": arguments.rank, "lora_alpha": 2 * arguments.rank}
            | {"target_modules": "all-linear"},
            "training": {
                "epochs": arguments.epochs,
                "batch_size": 32,
                "learning_rate": arguments.learning_rate,
                "seed": arguments.seed,
            },
            "output": str(work / "run"),
        }
    )
    result = train(run, say=lambda _: None)
    place = locate(run.model.name)
    base, _ = load_model(run, place, load_config(run, place, result.labels))
    merged = PeftModel.from_pretrained(base, result.adapter_path).merge_and_unload()
    with whole_folder(folder, force=True) as temporary:
        merged.save_pretrained(temporary)
        load_tokenizer(run.model, place).save_pretrained(temporary)
        (temporary / "result.json").write_bytes((work / "run" / "result.json").read_bytes())
    name = run.metric
    return f"{name} {result.before[name]:.3f} -> {result.after[name]:.3f} ({result.seconds:.0f} s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("siblings"), help="folder for the siblings (default: siblings)"
    )
    parser.add_argument("--model", default="all-minilm-l6-v2", help="bundled name or folder of the base")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--method", default="lora", help="method of `rankfold methods` to tune with")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=3000, help="training rows of each task at most (default: 3000)")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--basis", type=Path, help="then build a subspace of every linear layer, rank 8 (.safetensors)")
    parser.add_argument("--source", choices=("weights", "delta"), default="weights", help="of what (default: weights)")
    arguments = parser.parse_args()
    quiet()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for task in arguments.tasks:
        folder = arguments.out / task
        if folder.exists():
            print(f"{task}: {folder} is there already")
            continue
        with tempfile.TemporaryDirectory(dir=arguments.out, prefix=f".{task}.") as work:
            print(f"{task}: {make(task, folder, Path(work), arguments)} -> {folder}", flush=True)
    if arguments.basis is not None and not arguments.basis.exists():
        build_basis([arguments.out / task for task in arguments.tasks], arguments)


def build_basis(siblings: list[Path], arguments: argparse.Namespace) -> None:
    found = build_subspace(
        siblings,
        arguments.basis,
        base=locate(arguments.model) if arguments.source == "delta" else None,
        targets=LINEAR,
        scope="module",  # the shapes differ
        source=arguments.source,
        rank=8,
    )
    print(found.summary(), flush=True)


if __name__ == "__main__":
    main()
