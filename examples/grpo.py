"""TRL's GRPOTrainer with RaSA on reading words aloud: the reward compares the phonemes with the dictionary's, so nobody has to judge.

python examples/grpo.py --tiny                # a random model, seconds
python examples/grpo.py -o spoken             # the bundled SmolLM2 and dictionary (make assets), completions from transformers
python examples/grpo.py --engine vllm         # completions from vLLM: before each batch it gets the fold of the policy
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import argparse
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from datasets import Dataset
from tiny_llama import tiny_llama
from trl import GRPOConfig, GRPOTrainer

from rankfold import AdapterCallback, RasaConfig
from rankfold.fold import fold_adapter
from rankfold.io.assets import dataset, model_path
from rankfold.train import FoldedRollouts, VllmEngine

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
parser.add_argument("--model", help="a folder or hub id (default: the bundled SmolLM2-135M-Instruct)")
parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--tiny", action="store_true")
parser.add_argument("-o", "--output", type=Path, default=Path("runs/grpo"))
options = parser.parse_args()
if options.tiny:
    name, steps = options.model or tiny_llama(), 2
    rows = Dataset.from_list([{"prompt": "Word: c a t\nPhonemes:", "completion": " k ae t"}] * 8)
else:
    name, steps = options.model or str(model_path("smollm2-135m-instruct")), options.steps
    rows = dataset("phonemes")["train"].shuffle(seed=0).select(range(2000))


def alike(completions: list[str], spoken: list[str], **_: Any) -> list[float | None]:
    """How much of the first line is the dictionary's phonemes, from 0 to 1."""
    said = [(completion.strip().splitlines() or [""])[0].split() for completion in completions]
    return [SequenceMatcher(None, words, right.split()).ratio() for words, right in zip(said, spoken, strict=True)]


rollouts = None  # transformers generates with the live model
if options.engine == "vllm":
    from vllm import LLM  # pyright: ignore[reportMissingImports]

    llm = LLM(name, enable_lora=True, max_lora_rank=64, logprobs_mode="processed_logprobs", max_model_len=512)
    rollouts = FoldedRollouts(VllmEngine(llm, max_rank=64))
arguments = GRPOConfig(
    output_dir=str(options.output), max_steps=steps, per_device_train_batch_size=8, num_generations=4,
    max_completion_length=32, learning_rate=1e-3, beta=0.0, logging_steps=max(steps // 20, 1), save_steps=steps,
    report_to="none", bf16=False,
)  # fmt: skip
trainer = GRPOTrainer(
    model=name,
    reward_funcs=alike,
    args=arguments,
    train_dataset=rows.rename_column("completion", "spoken"),
    peft_config=RasaConfig(r=8, shared_rank=1, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[AdapterCallback()],
    rollout_func=rollouts,
)
trainer.train()
trainer.save_model(str(options.output / "adapter"))
print(fold_adapter(options.output / "adapter", options.output / "folded", base=name, force=True).summary())
