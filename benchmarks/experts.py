"""One training step on fused experts, rankfold's LoRA beside PEFT's, as ratios to the frozen base in the same round.

    python benchmarks/experts.py                              # Qwen3-MoE and Mixtral, 16, 64 and 128 experts
    python benchmarks/experts.py --experts 8 --rounds 3 --tokens 64      # a smoke run
    python benchmarks/experts.py --device cuda --dtype bf16 --tokens 2048

What is to be seen: PEFT adds ΔW to the weights of every expert at each forward, so its step grows with the number of experts;
ours multiplies tokens by the factors of the experts that they go to. Top-k, tokens and sizes stay the same while the number
of experts grows. Every variant runs in random order in every round; a figure is the median over rounds of the ratio to the frozen
base of that round, quartiles in brackets. Run it alone: a second job spoils it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn

from rankfold import PlainLoraConfig, RasaConfig

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "head_dim": 64,
}
FAMILIES: dict[str, Any] = {
    "qwen3_moe": lambda e: hf.Qwen3MoeModel(
        hf.Qwen3MoeConfig(**SIZES, moe_intermediate_size=128, num_experts=e, num_experts_per_tok=4)
    ),
    "mixtral": lambda e: hf.MixtralModel(
        hf.MixtralConfig(**SIZES, intermediate_size=512, num_local_experts=e, num_experts_per_tok=2)
    ),
}
TARGETS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def variants(rank: int) -> dict[str, Any]:
    """Name to config; None is the frozen base."""
    return {
        "frozen base": None,
        f"PEFT LoRA r={rank}": LoraConfig(r=rank, **TARGETS),
        f"rankfold LoRA r={rank}": PlainLoraConfig(r=rank, **TARGETS),
        f"rankfold RaSA r={rank}, k=1": RasaConfig(r=rank, shared_rank=1, **TARGETS),
    }


def build(family: str, experts: int, config: Any, args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family](experts).to(args.device, torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    if config is None:
        return model.requires_grad_(False).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of the module's type
        return get_peft_model(model, config, autocast_adapter_dtype=False).train()


def measure(family: str, experts: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every variant of one family with so many experts."""
    models = {name: build(family, experts, config, args) for name, config in variants(args.rank).items()}
    dtype = next(models["frozen base"].parameters()).dtype
    x = torch.randn(1, args.tokens, SIZES["hidden_size"], device=args.device, dtype=dtype, requires_grad=True)
    cotangent = torch.randn_like(x)

    def step(model: nn.Module) -> float:
        x.grad = None
        model.zero_grad()
        start = time.perf_counter()
        model(inputs_embeds=x, use_cache=False).last_hidden_state.backward(cotangent)
        if args.device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    for model in models.values():
        step(model)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(args.rounds):
        for name in random.sample(list(models), len(models)):
            times[name].append(step(models[name]))
    rows = []
    for name, seconds in times.items():
        ratios = [t / base for t, base in zip(seconds, times["frozen base"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {"family": family, "experts": experts, "variant": name, "ratio": median, "low": low, "high": high}
            | {"seconds": statistics.median(seconds)}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write settings, versions and rows to this file")
    args = parser.parse_args()
    rows = [row for family in FAMILIES for experts in args.experts for row in measure(family, experts, args)]
    table = Table("model", "experts", "variant", "step / frozen base", "seconds", box=None)
    for r in rows:
        ratio = f"{r['ratio']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"
        table.add_row(r["family"], str(r["experts"]), r["variant"], ratio, f"{r['seconds']:.4f}")
    Console().print(table)
    if args.json:
        packages = {p: version(p) for p in ("rankfold", "peft", "torch", "transformers")}
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        args.json.write_text(json.dumps({"settings": settings, "versions": packages, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
