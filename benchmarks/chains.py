"""What a chain costs per optimiser step as its links add up, as ratios to plain LoRA in the same round.

    python benchmarks/chains.py                          # 0 to 256 links: writes benchmarks/results/chains.json
    python benchmarks/chains.py --links 0 4 --rounds 1 --layers 2 --no-json      # quick, to see that it runs
    python benchmarks/chains.py --device cuda --dtype bf16

A step is forward, backward and AdamW on the decoder stack of SmolLM2-135M (all seven linears, no head; the cotangent is fixed). LoRA, COLA
and RAC-LoRA have the same live rank; RAC-LoRA trains one factor. "re-factored" is the same chain after `compact`, as training keeps it
once the frozen rank of a matrix passes min(in, out)/2. A knot's own cost is timed apart, with and without re-factoring, in steps of
plain LoRA. XGBLoRA trains one layer per booster: its step is timed with the lowest, the middle and the top layer drawn, after no link;
its backward pass ends there. Variants run in random order in every round; a figure is the median over rounds of the ratio to plain LoRA of
that round, quartiles in brackets. Run it alone: a second job spoils it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaModel

from rankfold import ColaConfig, PlainLoraConfig, RacLoraConfig, XgbLoraConfig, attach
from rankfold.kernel.factors import Factors
from rankfold.methods.chain import Chain

RESULTS = Path(__file__).parent / "results" / "chains.json"
SHAPE: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
NEVER = 10**9  # optimiser steps of a link: no knot is tied while steps are timed
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BASELINE = "LoRA"


class Steps:
    """One variant: a model, its optimiser, and one step."""

    def __init__(self, config: Any, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        base: Any = LlamaModel(LlamaConfig(vocab_size=32, num_hidden_layers=args.layers, use_cache=False, **SHAPE))
        config.target_modules = "all-linear"
        self.device = torch.device(args.device)
        model: Any = get_peft_model(base.to(self.device, DTYPES[args.dtype]), config)
        self.model = model.train()
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, foreach=True)
        shape = (1, args.tokens, SHAPE["hidden_size"])
        self.x = torch.randn(shape, device=self.device, dtype=DTYPES[args.dtype])
        self.g = torch.randn(shape, device=self.device, dtype=DTYPES[args.dtype])

    @property
    def adapters(self) -> list[Any]:
        return [m for m in self.model.modules() if hasattr(m, "frozen_rank")]

    def with_links(self, links: int, compacted: bool) -> Steps:
        for a in self.adapters:
            rank, site = links * a.r, a.site
            down = torch.randn(rank, site.in_features, device=self.device)
            a.add_link(Factors(down, torch.randn(site.out_features, rank, device=self.device)))
            if compacted:
                a.compact()
        attach(self.model, self.optimizer)
        return self

    def with_layer(self, layer: int) -> Steps:
        attach(self.model, self.optimizer)
        for name, module in self.model.named_modules():
            if isinstance(module, Chain):
                module.resting = f".layers.{layer}." not in name
        return self

    def frozen_rank(self) -> int:
        return max((a.frozen_rank for a in self.adapters), default=0)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(inputs_embeds=self.x).last_hidden_state.backward(self.g)
        self.optimizer.step()

    def knot(self, compacted: bool) -> None:
        """What one knot does to every matrix; the links are as they were before."""
        for a in self.adapters:
            before = a.links_down, a.links_up
            a.add_link(a.finished(0))
            if compacted:
                a.compact()
            a.start(1, torch.Generator().manual_seed(0))
            a.links_down, a.links_up = before


def variants(args: argparse.Namespace) -> dict[str, Steps]:
    r = args.rank
    found = {BASELINE: Steps(PlainLoraConfig(r=r), args)}
    for links in args.links:
        found[f"COLA, {links} links"] = Steps(ColaConfig(r=r, link_steps=NEVER), args).with_links(
            links, compacted=False
        )
        if links:
            found[f"COLA, {links} links, re-factored"] = Steps(ColaConfig(r=r, link_steps=NEVER), args).with_links(
                links, compacted=True
            )
        found[f"RAC-LoRA, {links} links"] = Steps(RacLoraConfig(r=r, link_steps=NEVER), args).with_links(
            links, compacted=False
        )
    for name, layer in (("lowest", 0), ("middle", args.layers // 2), ("top", args.layers - 1)):
        found[f"XGBLoRA, {name} layer of {args.layers}"] = Steps(XgbLoraConfig(r=1, link_steps=NEVER), args).with_layer(
            layer
        )
    return found


def seconds(run: Callable[[], None], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, middle, high


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", type=int, nargs="+", default=[0, 1, 4, 16, 64, 256])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--no-json", action="store_true")
    args = parser.parse_args(argv)

    found = variants(args)
    times: dict[str, list[float]] = {name: [] for name in found}
    chance = random.Random(0)
    for steps in found.values():
        steps.step()  # what is made once is not part of a step
    for _ in range(args.rounds):
        for name in chance.sample(list(found), len(found)):
            times[name].append(seconds(found[name].step, found[name].device))
    chain = found[f"COLA, {max(args.links)} links"]
    for label, compacted in (("a knot", False), (f"a knot that re-factors {max(args.links)} links", True)):
        with torch.no_grad():
            times[label] = [seconds(lambda c=compacted: chain.knot(c), chain.device) for _ in range(args.rounds)]

    table = Table("", "frozen rank", "step / LoRA's", "", box=None, title_justify="left")
    rows = {}
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times[BASELINE], strict=True)]
        low, middle, high = quartiles(ratios)
        rank = found[name].frozen_rank() if name in found else None
        rows[name] = {"frozen_rank": rank, "ratio": middle, "quartiles": [low, high]}
        table.add_row(name, "" if rank is None else str(rank), f"{middle:.3f}", f"[{low:.3f}, {high:.3f}]")
    Console(width=110).print(table)
    result = {
        "settings": {k: v for k, v in vars(args).items() if k not in ("json", "no_json")},
        "versions": {p: version(p) for p in ("torch", "transformers", "peft")},
        "python": sys.version.split()[0],
        "seconds_of_lora": statistics.median(times[BASELINE]),
        "rows": rows,
    }
    if not args.no_json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {args.json}")
    return result


if __name__ == "__main__":
    main()
