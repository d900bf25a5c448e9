"""A bare PyTorch loop: a scheduled method (SoRA), an optimiser that knows what a pair of factors is (LoRA-RITE), and a fold.

python examples/bare_loop.py --tiny                                  # a random model, seconds
python examples/bare_loop.py --model PATH --texts FILE -o trained    # your model; a text per line
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import get_peft_model
from tiny_llama import tiny_llama
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import rankfold
from rankfold.fold import fold_adapter
from rankfold.optim import LoraRite

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
parser.add_argument("--texts", type=Path)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--tiny", action="store_true")
parser.add_argument("-o", "--output", type=Path, default=Path("runs/bare_loop"))
options = parser.parse_args()
name = tiny_llama() if options.tiny else options.model
texts = options.texts.read_text(encoding="utf-8").splitlines() if options.texts else ["One sentence."] * 32

tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
batches = DataLoader([text for text in texts if text.strip()], batch_size=8, shuffle=True)  # pyright: ignore[reportArgumentType]

steps = options.epochs * len(batches)
# every step takes `threshold` off every gate, so the whole run takes 0.5 off those that no gradient holds up
config = rankfold.SoraConfig(
    r=8, lora_alpha=16, threshold=0.5 / steps, target_modules="all-linear", task_type="CAUSAL_LM"
)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), config)
optimizer = LoraRite(model, lr=5e-3)  # or torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
schedule = rankfold.attach(model, optimizer, total_steps=steps)  # acts in optimizer.step()

model.train()
for epoch in range(options.epochs):
    for batch in batches:
        tokens = tokenizer(batch, return_tensors="pt", padding=True, truncation=True, max_length=256)
        labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
        loss = model(**tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, ranks {sum(sum(r.values()) for r in schedule.ranks().values())}")

# To resume, save optimizer.state_dict() beside the adapter: the schedule's state is in it.
options.output.mkdir(parents=True, exist_ok=True)
torch.save(optimizer.state_dict(), options.output / "optimizer.pt")
model.save_pretrained(options.output / "adapter")
print(fold_adapter(options.output / "adapter", options.output / "folded", base=name, force=True).summary())
