"""The time of one optimiser step on LoRA factors, as ratios to AdamW in the same round, and the bytes of optimiser state.

    python benchmarks/optimisers.py                      # SmolLM2-135M, 210 pairs, r = 16: writes benchmarks/results/optimisers.json
    python benchmarks/optimisers.py --layers 2 --rounds 3 --no-json      # quick, to see that it runs
    python benchmarks/optimisers.py --device cuda
    pip install --no-deps pytorch-optimizer              # first, for its LoRA-RITE beside ours

Every optimiser has factors of its own, with the same gradients in every round (no model, no forward). They run in random order in
every round; a figure is the median over rounds of the ratio to AdamW (foreach) of that round, quartiles in brackets. "per layer" is
our own algebra with every pair in a stack of its own, as a loop over layers has it. Run it alone: a second job spoils it.

"of a train step" is the optimiser's share of a whole step of `rankfold train` (benchmarks/train.py: SmolLM2-135M, 32 rows per batch, bf16
weights), timed inside it, in a process of its own.

LoRA-Pro "full" keeps out×in moments. The least that its step can take is what one pass over them costs, counted here as reading
and writing both moments (16 bytes per element of W in float32) at the bandwidth that AdamW (fused) reached in this run (28 bytes per
parameter); the table has that floor beside its time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from peft.optimizers import create_riemannian_optimizer
from peft.optimizers.lorafa import LoraFAOptimizer
from rich.console import Console
from rich.table import Table
from torch import nn

from rankfold.optim import LoraFa, LoraPro, LoraRite, Riemannian
from rankfold.optim.pair_optimizer import PairOptimizer
from rankfold.optim.pairs import Pair
from rankfold.optim.registry import OPTIMIZERS
from rankfold.optim.stacks import Stack

RESULTS = Path(__file__).parent / "results" / "optimisers.json"
#: (out, in) of the linears of one layer of SmolLM2-135M.
SHAPES = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576), "gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}  # fmt: skip
SCALE = 2.0


class Factors(nn.Module):
    """The factors of one layer under PEFT's names, which PEFT's optimisers read."""

    def __init__(self, out: int, in_: int, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(in_, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, out, bias=False)})

    @property
    def pair(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_A["default"].get_parameter("weight"), self.lora_B["default"].get_parameter("weight")


def factors(layers: int, rank: int, device: str) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {f"{i}_{name}": Factors(*shape, rank) for i in range(layers) for name, shape in SHAPES.items()}
    ).to(device)


def pairs_of(model: nn.ModuleDict) -> list[Pair]:
    return [Pair(name, *f.pair, SCALE) for name, f in model.items() if isinstance(f, Factors)]


def looped(cls: type[PairOptimizer]) -> Callable[..., PairOptimizer]:
    """The same algebra with one pair per stack."""

    class Looped(cls):
        def _stacked(self) -> list[Stack]:
            return [Stack([pair], self._shapes(pair)) for pair in self.pairs]

    return Looped


def peft_lora_fa(model: nn.ModuleDict) -> torch.optim.Optimizer:
    named = list(model.named_parameters())
    for name, p in named:
        p.requires_grad_("lora_B" in name)
    group: Any = {
        "params": [p for _, p in named],
        "names": [n for n, _ in named],
        "scaling_factors": [SCALE] * len(named),
    }
    groups: Any = [group]
    return LoraFAOptimizer(groups, lr=1e-4)


def plus(model: nn.ModuleDict) -> torch.optim.Optimizer:
    """LoRA+'s groups as LoraPlus makes them: downs, ups."""
    found = pairs_of(model)
    groups: Any = [{"params": [p.down for p in found], "lr": 1e-4}, {"params": [p.up for p in found], "lr": 16e-4}]
    return torch.optim.AdamW(groups, foreach=True)


def ours(cls: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[nn.ModuleDict], torch.optim.Optimizer]:
    return lambda model: cls(pairs_of(model), lr=1e-4, **options)


def of_pytorch_optimizer(model: nn.ModuleDict) -> torch.optim.Optimizer:
    """kozistr/pytorch_optimizer's LoRA-RITE, which takes downs and ups in turn."""
    package = importlib.import_module("pytorch_optimizer")
    return package.LoRARite([f for p in pairs_of(model) for f in (p.down, p.up)], lr=1e-4)


def variants(full: bool) -> dict[str, Callable[[nn.ModuleDict], torch.optim.Optimizer]]:
    found: dict[str, Callable[[nn.ModuleDict], torch.optim.Optimizer]] = {
        "AdamW (foreach)": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4, foreach=True),
        "AdamW (fused)": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True),
        "LoRA+": plus,
        "PEFT Riemannian": lambda m: create_riemannian_optimizer(m, torch.optim.AdamW, lr=1e-4),  # pyright: ignore[reportArgumentType]
        "Riemannian": ours(Riemannian),
        "Riemannian, per layer": ours(looped(Riemannian)),
        "PEFT LoRA-FA": peft_lora_fa,
        "LoRA-FA": ours(LoraFa),
        "LoRA-FA, per layer": ours(looped(LoraFa)),
        "LoRA-Pro efficient": ours(LoraPro, mode="efficient"),
        "LoRA-Pro efficient, per layer": ours(looped(LoraPro), mode="efficient"),
        "LoRA-RITE": ours(LoraRite),
        "LoRA-RITE, escape off": ours(LoraRite, escape=False),
        "LoRA-RITE, per layer": ours(looped(LoraRite)),
    }
    if installed("pytorch_optimizer"):
        found["pytorch_optimizer's LoRA-RITE (escape off)"] = of_pytorch_optimizer
    if full:
        found |= {"LoRA-Pro full": ours(LoraPro), "LoRA-Pro full, per layer": ours(looped(LoraPro))}
    return found


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Unique storages of more than one element."""
    kept: dict[int, int] = {}
    for entry in optimizer.state.values():
        for t in entry.values():
            if isinstance(t, torch.Tensor) and t.numel() > 1:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(kept.values())


#: Variants that a run file can name, for their share of a whole training step.
RUN_FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW (foreach)": ("adamw_torch", {}), "LoRA+": ("lora_plus", {}), "Riemannian": ("riemannian", {}), "LoRA-FA": ("lora_fa", {}),
    "LoRA-Pro efficient": ("lora_pro", {"mode": "efficient"}), "LoRA-RITE": ("lora_rite", {}), "LoRA-Pro full": ("lora_pro", {}),
}  # fmt: skip


def share_of_a_step(steps: int, name: str, options: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step of `rankfold train`, and of the optimiser in it."""
    command = [sys.executable, str(Path(__file__).with_name("train.py")), "--one", "rankfold", "--steps", str(steps)]
    command += ["--optimizer", name, "--optimizer-options", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {"step_seconds": found["step_s"], "share_of_step": found["optimizer_s"] / found["step_s"]}


def run(args: argparse.Namespace) -> dict[str, Any]:
    made: dict[str, tuple[torch.optim.Optimizer, nn.ModuleDict]] = {}
    for name, make in variants(args.full).items():
        if args.only and not any(o in name for o in [*args.only, "AdamW"]):
            continue
        model = factors(args.layers, args.rank, args.device)
        made[name] = make(model), model
    generator = torch.Generator(args.device).manual_seed(0)
    shapes = [p.shape for p in factors(args.layers, args.rank, args.device).parameters()]
    gradients = [torch.randn(s, generator=generator, device=args.device) * 1e-3 for s in shapes]

    def timed(optimizer: torch.optim.Optimizer, model: nn.ModuleDict) -> float:
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g.clone() if p.requires_grad else None
        synchronize(args.device)
        start = time.perf_counter()
        optimizer.step()
        synchronize(args.device)
        return time.perf_counter() - start

    for found in made.values():
        for _ in range(2):
            timed(*found)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    order = list(made)
    for _ in range(args.rounds):
        random.shuffle(order)
        for name in order:
            seconds[name].append(timed(*made[name]))
    return summary(args, made, seconds)


def summary(args: argparse.Namespace, made: dict[str, tuple[torch.optim.Optimizer, nn.ModuleDict]], seconds: dict[str, list[float]]) -> dict[str, Any]:  # fmt: skip
    rows = []
    for name, times in seconds.items():
        low, median, high = quartiles([t / base for t, base in zip(times, seconds["AdamW (foreach)"], strict=True)])
        rows.append({"variant": name, "seconds": statistics.median(times), "ratio": median, "low": low, "high": high,
                     "state_bytes": state_bytes(made[name][0])})  # fmt: skip
        if f"{name}, per layer" in seconds:
            loop = [slow / t for slow, t in zip(seconds[f"{name}, per layer"], times, strict=True)]
            rows[-1]["faster_than_loop"] = statistics.median(loop)
    if args.steps:
        for row in rows:
            if row["variant"] in RUN_FILES:
                row |= share_of_a_step(args.steps, *RUN_FILES[row["variant"]])
    parameters = sum(args.rank * (out + in_) for out, in_ in SHAPES.values()) * args.layers
    weights = sum(out * in_ for out, in_ in SHAPES.values()) * args.layers
    fused = statistics.median(seconds["AdamW (fused)"])
    expected = {
        name: row.state_bytes([(*s, args.rank) for s in SHAPES.values()] * args.layers)
        for name, row in OPTIMIZERS.items()
    }
    bandwidth = 28 * parameters / fused
    return {
        "settings": {k: v for k, v in vars(args).items() if k not in ("only", "json")}
        | {"threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("rankfold", "peft", "torch")},
        "pairs": len(SHAPES) * args.layers,
        "parameters": parameters,
        "state_bytes_expected": expected,
        "full_mode": {
            "elements": weights,
            "bytes": 16 * weights,  # both moments in float32, read and written once
            "bytes_per_second": bandwidth,  # AdamW (fused): 28 bytes per parameter
            "floor_seconds": 16 * weights / bandwidth,
        },
        "pytorch_optimizer": installed("pytorch_optimizer"),
        "rows": rows,
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--full", action=argparse.BooleanOptionalAction, default=True, help="LoRA-Pro full: 850 MB of state each"
    )
    parser.add_argument("--steps", type=int, default=10, help="of `rankfold train`, for the share of a step; 0: none")
    parser.add_argument("--only", nargs="*", help="variants whose name contains one of these, and AdamW")
    parser.add_argument("--json", type=Path, default=RESULTS, help="write the result here")
    parser.add_argument("--no-json", dest="json", action="store_const", const=None)
    args = parser.parse_args()
    result = run(args)
    title = (
        f"one step, {result['pairs']} pairs, r = {args.rank}, {args.device}, {result['settings']['threads']} threads"
    )
    table = Table(
        "optimiser",
        "ms",
        "ratio to AdamW (foreach)",
        "quartiles",
        "loop / stacks",
        "state MB",
        "of a train step",
        title=title,
    )
    for row in result["rows"]:
        spread, gain = f"{row['low']:.2f}–{row['high']:.2f}", row.get("faster_than_loop")
        cells = f"{row['seconds'] * 1e3:.1f}", f"{row['ratio']:.2f}", spread, "" if gain is None else f"{gain:.1f}"
        share = f"{row['share_of_step']:.1%}" if "share_of_step" in row else ""
        table.add_row(row["variant"], *cells, f"{row['state_bytes'] / 1e6:.1f}", share)
    console = Console(width=120 if not sys.stdout.isatty() else None)
    console.print(table)
    if args.full:
        floor = result["full_mode"]
        console.print(
            f"LoRA-Pro full: {floor['elements']:,} elements of W, two float32 moments read and written, 16 bytes each: "
            f"{floor['bytes'] / 1e9:.2f} GB at AdamW (fused)'s {floor['bytes_per_second'] / 1e9:.1f} GB/s take "
            f"{floor['floor_seconds'] * 1e3:.0f} ms"
        )
    if result["pytorch_optimizer"] is None:
        console.print("pytorch_optimizer is not installed, so its LoRA-RITE is left out")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
