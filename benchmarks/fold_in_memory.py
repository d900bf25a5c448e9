"""Time of `fold_state_dict`, which reinforcement learning calls at every sync of its rollout engine.

    python benchmarks/fold_in_memory.py           # SmolLM2-135M's shape, random weights, r = 16; run it alone

Prints the median of the repeats for new memory (`out=None`) and for that of the call before (`out=lora`), and copies of the same
bytes beside them: no fold can be faster than writing its result. Writes benchmarks/results/fold_in_memory.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from fold import SMOLLM2, TARGETS
from rankfold import PlainLoraConfig, RasaConfig, SoraConfig
from rankfold.fold import fold_state_dict

CONFIGS = {
    "LoRA": PlainLoraConfig(r=16, target_modules=TARGETS, init_lora_weights=False),
    "RaSA k=1": RasaConfig(r=16, shared_rank=1, target_modules=TARGETS, init_lora_weights=False),
    "SoRA": SoraConfig(r=16, target_modules=TARGETS, init_lora_weights=False, allow_unscheduled=True),
}


def measure(name: str, config: PeftConfig, dtype: torch.dtype, layers: int, repeats: int) -> dict[str, Any]:
    shape = LlamaConfig(vocab_size=64, num_hidden_layers=layers, dtype=dtype, **SMOLLM2)
    model = get_peft_model(AutoModelForCausalLM.from_config(shape), config)
    lora = fold_state_dict(model)
    source = {key: torch.randn_like(t) for key, t in lora.items()}
    runs: dict[str, Callable[[], object]] = {
        "new": lambda: fold_state_dict(model),
        "again": lambda: fold_state_dict(model, out=lora),
        "copy": lambda: [t.copy_(source[key]) for key, t in lora.items()],
    }
    times: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(repeats):
        for key, run in runs.items():
            begin = time.perf_counter()
            run()
            times[key].append(1e3 * (time.perf_counter() - begin))
    return {
        "method": name,
        "dtype": str(dtype).removeprefix("torch."),
        "rank": lora.rank,
        "megabytes": sum(t.numel() * t.element_size() for t in lora.values()) / 1e6,
        "ms": {key: statistics.median(found) for key, found in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    rows = []
    print(f"{'method':<10} {'dtype':<9} {'rank':>4} {'MB':>6} {'new':>8} {'again':>8} {'copy':>8}   (ms, median)")
    for name, config in CONFIGS.items():
        for dtype in (torch.float32, torch.bfloat16):
            row = measure(name, config, dtype, options.layers, options.repeats)
            shown = "".join(f" {ms:8.1f}" for ms in row["ms"].values())
            print(f"{name:<10} {row['dtype']:<9} {row['rank']:>4} {row['megabytes']:6.0f}{shown}", flush=True)
            rows.append(row)
    out = Path(__file__).parent / "results" / "fold_in_memory.json"
    out.write_text(json.dumps({"layers": options.layers, "repeats": options.repeats, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
