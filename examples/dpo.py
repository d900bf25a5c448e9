"""TRL's DPOTrainer with RaSA. The reference is the model with the adapter switched off, so no second copy is loaded.

python examples/dpo.py --tiny                                 # a random model, seconds
python examples/dpo.py --model PATH --rows FILE -o trained    # JSONL of {"prompt": …, "chosen": …, "rejected": …}
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset
from tiny_llama import tiny_llama
from trl import DPOConfig, DPOTrainer

from rankfold import AdapterCallback, RasaConfig
from rankfold.fold import fold_adapter

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--rows", type=Path)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--tiny", action="store_true")
parser.add_argument("-o", "--output", type=Path, default=Path("runs/dpo"))
options = parser.parse_args()
name, steps = (tiny_llama(), 4) if options.tiny else (options.model, options.steps)
if options.rows:
    rows = Dataset.from_json(str(options.rows))
else:
    rows = Dataset.from_list(
        [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i + 2}"} for i in range(64)]
    )

arguments = DPOConfig(
    output_dir=str(options.output), max_steps=steps, per_device_train_batch_size=4, learning_rate=5e-5, beta=0.1,
    logging_steps=max(steps // 10, 1), save_steps=steps, report_to="none", bf16=False,
)  # fmt: skip
trainer = DPOTrainer(
    model=name,
    args=arguments,
    train_dataset=rows,
    peft_config=RasaConfig(r=8, shared_rank=1, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[AdapterCallback()],  # RaSA has no schedule and needs none; methods that have one do
)
trainer.train()
trainer.save_model(str(options.output / "adapter"))
print(fold_adapter(options.output / "adapter", options.output / "folded", base=name, force=True).summary())
