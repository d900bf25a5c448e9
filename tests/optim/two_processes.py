"""Run by test_two_processes.py as one of two programs: every optimiser under DDP over gloo, also with schedules, and FSDP2.

python two_processes.py RANK FOLDER      writes FOLDER/<case>.<rank>.safetensors
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from small_llama import TARGETS, adapted, batch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from rankfold import ColaConfig, SoraConfig, XgbLoraConfig, attach
from rankfold.errors import RankfoldError
from rankfold.optim import LoraFa, LoraPlus, LoraPro, LoraRite, Riemannian

STEPS = 3
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora_plus": (LoraPlus, {}), "lora_pro-full": (LoraPro, {}), "lora_pro-efficient": (LoraPro, {"mode": "efficient"}),
    "lora_rite": (LoraRite, {"clip": 0.1}), "lora_fa": (LoraFa, {}), "riemannian": (Riemannian, {}),
}  # fmt: skip
#: The method of a case, where it is not PEFT's LoRA: knots and gates must come out the same on both.
METHODS: dict[str, Any] = {
    "lora_rite-cola": lambda: ColaConfig(r=2, links=3, target_modules=TARGETS),
    "lora_pro-xgblora": lambda: XgbLoraConfig(link_steps=2, layers_drawn=1, target_modules=TARGETS),
    "riemannian-sora": lambda: SoraConfig(r=4, threshold=0.1, target_modules=TARGETS),
}
CASES |= {name: next(case for key, case in CASES.items() if key.startswith(name.partition("-")[0])) for name in METHODS}


def start(name: str, seed: int = 1) -> Any:
    """In float64, so that two halves of a batch are as good as the whole."""
    if name in METHODS:
        return adapted(METHODS[name](), seed=seed).double()
    return adapted(seed=seed, modules_to_save=["lm_head"], rank_pattern={"v_proj": 2}).double()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rows: slice) -> dict[str, Tensor]:
    """Every adapter parameter, and what is frozen of a chain, after `STEPS`."""
    attach(model, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        ids = batch(step)[rows]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found |= {n: b for n, b in model.named_buffers() if "links" in n}
    return {n.removeprefix("module."): t.detach().clone() for n, t in found.items()}


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name, (cls, options) in CASES.items():
        model = start(name, seed=1 + rank)  # another one on every process: DDP brings them in line
        if cls is LoraFa:
            LoraFa(model)  # DDP must not wait for gradients of frozen factors
        wrapped = DistributedDataParallel(model, find_unused_parameters="xgblora" in name)
        save_file(
            train(wrapped, cls(wrapped, lr=0.01, **options), slice(2 * rank, 2 * rank + 2)),
            folder / f"{name}.{rank}.safetensors",
        )

    model = adapted()
    before = LoraRite(model)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    said = {}
    for name, (cls, options) in CASES.items():
        if name in METHODS:
            continue
        try:
            train(model, cls(model, lr=0.01, **options), slice(0, 2))
        except RankfoldError as error:
            said[name] = str(error)
    before.param_groups[0]["params"] = [p for n, p in model.named_parameters() if "lora_" in n]  # as accelerate does
    try:
        before.step()
    except RankfoldError as error:
        said["before"] = str(error)
    (folder / f"said.{rank}").write_text(repr(said), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
