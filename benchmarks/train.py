"""A whole training step, `rankfold train` against TRL's SFTTrainer with PEFT's LoRA: same model, rows, batches and settings.

    python benchmarks/train.py                       # bf16 weights, dropout 0.05, loss on the completion alone
    python benchmarks/train.py --batch 8 --steps 12 --rounds 3

SmolLM2-135M (bundled) learns to read words aloud; all linear layers, r = 16. Each measurement is a process of its own; the two take
turns. A step's time is from one optimiser step's end to the next, data loading and AdamW included, the first three left out. Memory
is the process's peak above what it held when training began: activations, gradients, optimiser. Run it alone.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ADAPTER: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "train.json")
    parser.add_argument("--optimizer", default="adamw_torch", help="of rankfold's run, as in a run file")
    parser.add_argument("--optimizer-options", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--one", choices=RUNS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args)))
        return
    found: dict[str, list[dict]] = {name: [] for name in RUNS}
    for _ in range(args.rounds):
        for name, runs in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            runs.append(json.loads(result.stdout.splitlines()[-1]))
            print(name, runs[-1], flush=True)
    theirs, ours = found["trl"], found["rankfold"]
    times = [t["step_s"] / o["step_s"] for t, o in zip(theirs, ours, strict=True)]
    memory = [o["peak_mib"] / t["peak_mib"] for t, o in zip(theirs, ours, strict=True)]
    print(f"rankfold's step is {statistics.median(times):.2f} times as fast ({min(times):.2f}–{max(times):.2f})")
    print(f"and takes {statistics.median(memory):.2f} of the memory ({min(memory):.2f}–{max(memory):.2f})")
    settings = {k: v for k, v in vars(args).items() if k not in ("one", "json")}
    packages = {p: version(p) for p in ("rankfold", "trl", "peft", "torch", "transformers")}
    result = {"settings": settings, "speed": times, "memory": memory, "runs": found, "versions": packages}
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


class Clock:
    """The time of every step, that of the optimiser in it, and the memory before the first."""

    def __new__(cls) -> Any:
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            ends: list[float]

            def on_train_begin(self, *_: Any, **__: Any) -> None:
                self.ends, self.in_optimizer, self.before = [], [], resident()

            def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
                self.begun = time.perf_counter()

            def on_optimizer_step(self, *_: Any, **__: Any) -> None:
                self.in_optimizer.append(time.perf_counter() - self.begun)

            def on_step_end(self, *_: Any, **__: Any) -> None:
                self.ends.append(time.perf_counter())

        return Callback()


def resident() -> int:
    """Bytes of the process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(args: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        clock, tokens = RUNS[args.one](args, Path(folder))
    steps = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)][2:]
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    optimizer = statistics.median(clock.in_optimizer[3:])
    return {
        "step_s": statistics.median(steps),
        "optimizer_s": optimizer,
        "peak_mib": (peak - clock.before) / 2**20,
        "tokens": tokens,
    }


def run_file(args: argparse.Namespace, folder: Path) -> Any:
    from rankfold.runfile.load import parse

    return parse(
        {
            "model": {"name": "smollm2-135m-instruct", "dtype": args.dtype},
            "task": "causal-lm",
            "data": {"source": "phonemes", "max_train": args.batch * args.steps, "max_validation": 1, "max_test": 1},
            "method": {"name": "lora", "lora_dropout": args.dropout, **ADAPTER},
            "training": {
                "max_steps": args.steps,
                "batch_size": args.batch,
                "learning_rate": 1e-3,
                "optimizer": args.optimizer,
                "optimizer_options": args.optimizer_options,
            },
            "output": str(folder / "run"),
        }
    )


def rankfold(args: argparse.Namespace, folder: Path) -> tuple[Any, int]:
    """The trainer that `rankfold train` makes."""
    from rankfold.train import model
    from rankfold.train.optimizer import RunOptimizer
    from rankfold.train.prepare import prepare
    from rankfold.train.trainers import make_trainer

    prepared = prepare(run_file(args, folder))
    base, new = model.load_model(prepared.run, prepared.place, prepared.config)
    adapted = model.adapt(base, prepared.peft_config, new, prepared.processor)
    clock = Clock()
    trainer = make_trainer(prepared, adapted, [clock], RunOptimizer.of(prepared.run, adapted))
    trainer.args.eval_strategy, trainer.args.save_strategy = "no", "no"
    trainer.args.load_best_model_at_end = False
    trainer.train()
    return clock, int(trainer.state.num_input_tokens_seen)


def trl(args: argparse.Namespace, folder: Path) -> tuple[Any, int]:
    """What TRL's documentation shows, with the same rows, in the same dtype."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from rankfold.io.models import locate
    from rankfold.train import model
    from rankfold.train.data import load_rows

    run = run_file(args, folder)
    place = locate(run.model.name)
    clock = Clock()
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, args.dtype)),
        args=SFTConfig(
            output_dir=str(folder), max_steps=args.steps, per_device_train_batch_size=args.batch, learning_rate=1e-3,
            bf16=False, use_cpu=True, save_strategy="no", report_to="none", gradient_checkpointing=False,
            include_num_input_tokens_seen="non_padding", lr_scheduler_type="linear", disable_tqdm=True,
        ),
        train_dataset=load_rows(run).splits["train"],
        processing_class=model.load_tokenizer(run.model, place),
        peft_config=LoraConfig(task_type="CAUSAL_LM", lora_dropout=args.dropout, **ADAPTER),
        callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    return clock, int(trainer.state.num_input_tokens_seen)


RUNS = {"trl": trl, "rankfold": rankfold}

if __name__ == "__main__":
    main()
