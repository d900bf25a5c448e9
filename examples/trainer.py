"""transformers' Trainer with a scheduled method: SoRA prunes ranks while it trains, and the result becomes a plain LoRA.

python examples/trainer.py --tiny                                  # a random model, seconds
python examples/trainer.py --model PATH --texts FILE -o trained    # your model; a text per line
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset
from peft import get_peft_model
from tiny_llama import tiny_llama
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from rankfold import AdapterCallback, SoraConfig
from rankfold.fold import fold_adapter

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
parser.add_argument("--texts", type=Path)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--tiny", action="store_true")
parser.add_argument("-o", "--output", type=Path, default=Path("runs/trainer"))
options = parser.parse_args()
name, steps = (tiny_llama(), 8) if options.tiny else (options.model, options.steps)
texts = options.texts.read_text(encoding="utf-8").splitlines() if options.texts else ["One sentence."] * 32

tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
rows = Dataset.from_dict({"text": [text for text in texts if text.strip()]})
rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=256), remove_columns=["text"])

# every step takes `threshold` off every gate, so the whole run takes 0.5 off those that no gradient holds up
config = SoraConfig(r=8, lora_alpha=16, threshold=0.5 / steps, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), config)
arguments = TrainingArguments(
    output_dir=str(options.output), max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-3,
    logging_steps=max(steps // 10, 1), save_steps=steps, report_to="none",
)  # fmt: skip
trainer = Trainer(
    model=model,
    args=arguments,
    train_dataset=rows,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    callbacks=[AdapterCallback()],  # runs the schedule; without it the first step is refused
)
trainer.train()  # resume_from_checkpoint=True continues, schedule included
model.save_pretrained(options.output / "adapter")
print(fold_adapter(options.output / "adapter", options.output / "folded", base=name, force=True).summary())
