"""One training step's forward and backward, as ratios to the frozen base in the same round.

    python benchmarks/step.py                        # fp32, dropout 0: the table of the README
    python benchmarks/step.py --dtype bf16 --dropout 0.05 --rounds 15
    python benchmarks/step.py --shape large --tokens 4096 --compile
    python benchmarks/step.py --every-method         # all of rankfold's, at the same r
    python benchmarks/step.py --picture docs/pictures/step.svg benchmarks/results/step-*.json

The limit is the frozen decoder stack with a gradient into its input: what any adapter must at least pay. All seven linears
are adapted, the cotangent is fixed, there is no head, loss or optimiser: this isolates the adapter. Variants run in random
order in every round; a figure is the median over rounds of the ratio to the limit of that round, quartiles in brackets.
Saved MiB: unique storages kept for the backward, parameters excluded. "by hand" is the least that an eager adapter costs
(floor.py); in float32 there is a second frozen base, with the products of rankfold/kernel/matmul.py: on most machines it is the first.
Run it alone: a second job spoils it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import floor
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaModel

from rankfold import PlainLoraConfig, RasaConfig
from rankfold.host.registry import find

SHAPES = {
    # SmolLM2-135M's layers, eight of its thirty
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 8},
    "large": {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 4, "num_hidden_layers": 2},
}  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def variants(rank: int, effective: int, layers: int, dropout: float) -> dict[str, PeftConfig | None]:
    """Name to config; None is the frozen base. RaSA's r and k are chosen to reach the effective rank with few layers."""
    k = min(max((effective - rank) // (layers - 1), 1), effective // layers)  # so that k <= r
    r = effective - (layers - 1) * k
    common = {"lora_alpha": 2 * rank, "lora_dropout": dropout, "target_modules": TARGETS}
    return {
        "frozen base": None,
        f"PEFT LoRA r={rank}": LoraConfig(r=rank, **common),
        f"rankfold LoRA r={rank}": PlainLoraConfig(r=rank, **common),
        f"PEFT LoRA r={effective}": LoraConfig(r=effective, **common),
        f"rankfold RaSA R={effective} (r={r}, k={k}, L={layers})": RasaConfig(r=r, shared_rank=k, **common),
    }


def every_method(rank: int, dropout: float) -> dict[str, PeftConfig | None]:
    """rankfold's methods with their defaults, but CoRA, whose r × r core needs a basis file."""
    own: dict[str, dict[str, Any]] = {
        "adalora": {"target_r": rank // 2},
        "dynamic_dora": {"target_r": rank // 2, "lora_dropout": 0.0},
    }
    common = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": dropout, "target_modules": TARGETS}
    found: dict[str, PeftConfig | None] = {"frozen base": None, f"PEFT LoRA r={rank}": LoraConfig(**common)}
    for method in find():
        if method.name != "cora":
            found[f"rankfold {method.title} r={rank}"] = method.config(**{**common, **own.get(method.name, {})})
    return found


def build(shape: dict[str, Any], config: PeftConfig | None, dtype: torch.dtype, compiled: bool) -> nn.Module:
    torch.manual_seed(0)
    model: Any = LlamaModel(LlamaConfig(vocab_size=64, **shape))
    model.to(dtype)
    if config is None:
        model.requires_grad_(False)
    else:
        model = get_peft_model(model, config)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad and p.ndim == 2:
                    p.normal_(std=0.02)
    model.train()
    return torch.compile(model) if compiled else model  # pyright: ignore[reportReturnType]


def saved_mib(step: Callable[[], object], model: nn.Module) -> float:
    """Bytes kept for the backward, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    return sum(kept.values()) / 2**20


def run(args: argparse.Namespace) -> dict:
    shape, dtype = SHAPES[args.shape], torch.bfloat16 if args.dtype == "bf16" else torch.float32
    autocast: Callable[[], AbstractContextManager] = nullcontext
    if args.dtype == "autocast":
        autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    batch, length = max(args.tokens // args.length, 1), min(args.length, args.tokens)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, shape["hidden_size"], generator=generator).to(dtype).requires_grad_()
    cotangent = torch.randn(batch, length, shape["hidden_size"], generator=generator).to(dtype)
    chosen = (
        every_method(args.rank, args.dropout)
        if args.every_method
        else variants(args.rank, args.effective, shape["num_hidden_layers"], args.dropout)
    )
    models = {
        name: build(shape, config, dtype, args.compile)
        for name, config in chosen.items()
        if args.only is None or any(o in name for o in [*args.only, "frozen"])
    }
    if args.compile:
        models["frozen base, eager"] = build(shape, None, dtype, False)
    elif args.dtype != "autocast":
        models[f"by hand r={args.rank}"] = floor.adapt(build(shape, None, dtype, False), args.rank)
        if args.dtype == "fp32":
            models["frozen base, our products"] = floor.with_our_products(build(shape, None, dtype, False))

    def forward(model: nn.Module) -> torch.Tensor:
        with autocast():
            return model(inputs_embeds=x, use_cache=False).last_hidden_state

    def step(model: nn.Module) -> float:
        x.grad = None
        for p in model.parameters():
            p.grad = None
        start = time.perf_counter()
        out = forward(model)
        out.backward(cotangent.to(out.dtype))
        return time.perf_counter() - start

    saved = {}
    for name, model in models.items():
        step(model)  # warm-up, compilation
        held: list[torch.Tensor] = []
        saved[name] = saved_mib(lambda m=model, h=held: h.append(forward(m)), model)
        held.clear()
    ratios: dict[str, list[float]] = {name: [] for name in models}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    order = list(models)
    for _ in range(args.rounds):
        random.shuffle(order)
        times = {name: step(models[name]) for name in order}
        for name, t in times.items():
            seconds[name].append(t)
            ratios[name].append(t / times["frozen base"])
    rows = []
    for name in models:
        low, median, high = statistics.quantiles(ratios[name], n=4)
        rows.append(
            {"variant": name, "ratio": median, "low": low, "high": high, "saved_mib": saved[name], "seconds": statistics.median(seconds[name])}
        )  # fmt: skip
    packages = {p: version(p) for p in ("rankfold", "peft", "torch", "transformers")}
    settings = vars(args) | {"threads": torch.get_num_threads()}
    settings |= {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")}
    return {"settings": settings, "versions": packages, "rows": rows}


def draw(path: Path, results: list[dict]) -> None:
    """Overhead over the frozen base and saved bytes, a group of bars for each result."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"PEFT LoRA": "#999999", "rankfold LoRA": "#0072b2", "rankfold RaSA": "#009e73", "by hand": "#e69f00",
               "frozen base, our products": "#56b4e9"}  # fmt: skip
    figure, (left, right) = plt.subplots(1, 2, figsize=(max(11, 2.4 * len(results)), 4), layout="constrained")
    place, ticks, labels, seen = 0.0, [], [], set()
    for result in results:
        settings = result["settings"]
        bars = [r for r in result["rows"] if r["variant"].startswith(tuple(colours))]
        base = next(r for r in result["rows"] if r["variant"] == "frozen base")
        begin = place
        for row in bars:
            kind = next(k for k in colours if row["variant"].startswith(k))
            rank = row["variant"].partition("=")[2].split(" ")[0]
            low, high = (abs(row[k] - row["ratio"]) * 100 for k in ("low", "high"))
            label = kind + (f" r={rank}" if rank else "") + ", no dropout" * (kind == "by hand")
            hatch = "//" if rank not in ("", str(settings["rank"])) else None
            known = label in seen
            seen.add(label)
            left.bar(place, (row["ratio"] - 1) * 100, 0.8, yerr=[[low], [high]], color=colours[kind], hatch=hatch,
                     edgecolor="white", label=None if known else label, ecolor="#444444")  # fmt: skip
            kept = row["saved_mib"] / base["saved_mib"]
            right.bar(place, kept, 0.8, color=colours[kind], hatch=hatch, edgecolor="white")
            place += 1
        ticks.append((begin + place - 1) / 2)
        tokens = f"{settings['tokens']} tokens" + f", {settings['shape']}" * (settings["shape"] != "smollm2")
        labels.append(
            f"{settings['dtype']}{', compiled' * settings['compile']}\ndropout {settings['dropout']:g}\n{tokens}"
        )
        place += 1
    left.set(title="Time over the frozen base, %", xticks=ticks, xticklabels=labels)
    right.set(title="Bytes kept for the backward, frozen base = 1", xticks=ticks, xticklabels=labels)
    left.axhline(0, color="#444444", linewidth=0.8)
    right.axhline(1, color="#444444", linewidth=0.8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="x", labelsize=8)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "autocast"], default="fp32")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--effective", type=int, default=74, help="RaSA's rank r-k+Lk; 74 is r=16, k=2 at 30 layers")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", nargs="*", help="variants whose name contains one of these")
    parser.add_argument(
        "--every-method", action="store_true", help="every method of rankfold's instead of RaSA's ranks"
    )
    parser.add_argument(
        "--picture", nargs="+", type=Path, metavar="FILE", help="draw FILE from these JSON results; time nothing"
    )
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    if args.picture:
        draw(args.picture[0], [json.loads(path.read_text()) for path in args.picture[1:]])
        return
    result = run(args)
    title = f"{args.shape}, {args.tokens} tokens, {args.dtype}, dropout {args.dropout:g}{', compiled' * args.compile}"
    table = Table("variant", "ratio to frozen base", "quartiles", "saved MiB", "median s", title=title)
    for row in result["rows"]:
        spread = f"{row['low']:.3f}–{row['high']:.3f}"
        figures = f"{row['saved_mib']:.0f}", f"{row['seconds']:.3f}"
        table.add_row(row["variant"], f"{row['ratio']:.3f}", spread, *figures)
    Console(width=110 if not sys.stdout.isatty() else None).print(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
