"""Folding against PEFT's convert_to_lora: the same live adapter, the same rank, the same run.

    python benchmarks/fold.py                    # SmolLM2-135M's shape, random weights; some minutes, nearly all PEFT's
    python benchmarks/fold.py --layers 2 --rounds 1

PEFT's time is `convert_to_lora`, which returns tensors and measures no error; it is told the rank that makes the result exact.
Ours is given twice: `convert` does the same (factors in float32, in memory), `fold` is all of `fold_model`, with the proof
and the files on disk. PEFT's error is measured here against the layers' own updates. The last table compresses RaSA adapters of a 7B's shape (r=32, k=4, L=32: folded rank 156) to
rank 32, proof included. Run it alone: a second job spoils it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, PeftConfig, convert_to_lora, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rankfold import RasaConfig
from rankfold.fold import fold_model, lowered, peft_adapters
from rankfold.fold import native as ours
from rankfold.fold.compression import CompressionLimit, compress
from rankfold.fold.proof import prove
from rankfold.host.config import LowRankConfig
from rankfold.kernel.factors import Factors

SMOLLM2: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: out × in of one layer of a 7B.
LARGE = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


def configs(layers: int) -> dict[str, tuple[PeftConfig, int]]:
    """Name to config and the rank at which its fold is exact."""
    common: dict[str, Any] = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    rasa = RasaConfig(r=8, shared_rank=1, init_lora_weights=False, **common)
    return {
        f"RaSA r=8 k=1 L={layers}": (rasa, 8 - 1 + layers),
        "LoHa r=8": (LoHaConfig(r=8, alpha=8, init_weights=False, **common), 64),
        "LoKr r=8": (LoKrConfig(r=8, alpha=8, init_weights=False, decompose_factor=4, **common), 32),
    }


def compare(name: str, config: PeftConfig, rank: int, layers: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=layers, **SMOLLM2))
    model = get_peft_model(base, config).eval()
    whole, alone, worst = [], [], 0.0
    for _ in range(rounds):
        begin = time.perf_counter()
        converted(model)
        alone.append(time.perf_counter() - begin)
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            report = fold_model(model, Path(folder) / "out", dtype="float32")
            whole.append(time.perf_counter() - begin)
            worst = report.worst.frobenius
            assert report.needed_rank == rank, (report.needed_rank, rank)
    begin = time.perf_counter()
    _, tensors = convert_to_lora(model, rank=rank, progressbar=False)
    theirs = time.perf_counter() - begin
    return {
        "adapter": name,
        "folded_rank": rank,
        "convert_s": statistics.median(alone),
        "fold_s": statistics.median(whole),
        "peft_s": theirs,
        "convert_ratio": theirs / statistics.median(alone),
        "fold_ratio": theirs / statistics.median(whole),
        "rankfold_error": worst,
        "peft_error": peft_error(model, tensors),
    }


def converted(model: nn.Module) -> dict[str, Factors]:
    """A live adapter's factors in float32: all that `convert_to_lora` gives."""
    own = isinstance(model.peft_config["default"], LowRankConfig)  # pyright: ignore
    source = (ours if own else peft_adapters).from_model(model)
    return {name: lowered(source.update(name)).to(torch.float32) for name in source.adapted}  # pyright: ignore


def peft_error(model: nn.Module, tensors: dict[str, torch.Tensor]) -> float:
    """The largest relative Frobenius error of PEFT's result over the modules."""
    worst = 0.0
    for name, module in model.named_modules():
        key = next((k for k in tensors if k.endswith(f"{name.removeprefix('base_model.model.')}.lora_A.weight")), None)
        if key is None or not hasattr(module, "get_delta_weight"):
            continue
        delta = module.get_delta_weight("default").detach().double()  # pyright: ignore[reportCallIssue]
        found = tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()
        worst = max(worst, float((found - delta).norm() / delta.norm()))
    return worst


def large(layers: int) -> dict[str, Any]:
    """Seconds to compress and to prove RaSA's updates of a 7B's shape."""
    squeeze = proof = 0.0
    generator = torch.Generator().manual_seed(0)
    for out, into in LARGE * layers:
        down = torch.randn(156, into, generator=generator, dtype=torch.float64)
        update = Factors(down, torch.randn(out, 156, generator=generator, dtype=torch.float64))
        begin = time.perf_counter()
        cut = compress(update, CompressionLimit(rank=32))
        middle = time.perf_counter()
        prove("m", update, update, cut.balanced().to(torch.bfloat16).to(torch.float64), cut=cut)
        squeeze, proof = squeeze + middle - begin, proof + time.perf_counter() - middle
    return {"modules": len(LARGE) * layers, "from_rank": 156, "to_rank": 32, "compress_s": squeeze, "proof_s": proof}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--large-layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="benchmarks/results/fold.json")
    a = parser.parse_args()
    warnings.filterwarnings("ignore")

    rows = [compare(name, config, rank, a.layers, a.rounds) for name, (config, rank) in configs(a.layers).items()]
    columns = ("adapter", "rank", "PEFT s", "convert s", "ratio", "fold s", "ratio", "rankfold error", "PEFT error")
    table = Table(*columns, box=None)
    for r in rows:
        table.add_row(
            r["adapter"], str(r["folded_rank"]), f"{r['peft_s']:.1f}", f"{r['convert_s']:.3f}", f"{r['convert_ratio']:.0f}",
            f"{r['fold_s']:.2f}", f"{r['fold_ratio']:.0f}", f"{r['rankfold_error']:.0e}", f"{r['peft_error']:.0e}",
        )  # fmt: skip
    Console().print(table)
    big = large(a.large_layers)
    print(
        f"7B shape, {big['modules']} modules, rank 156 to 32: {big['compress_s']:.1f} s, proof {big['proof_s']:.1f} s"
    )
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "machine": platform.machine()}
    result = {"layers": a.layers, "rows": rows, "large": big, **machine}
    result["versions"] = {p: version(p) for p in ("rankfold", "peft", "torch")}
    Path(a.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
