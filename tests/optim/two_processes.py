"""Run by test_two_processes.py as one of two programs: every optimiser under DDP over gloo, and FSDP2.

python two_processes.py RANK FOLDER      writes FOLDER/<case>.<rank>.safetensors
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from small_llama import adapted, batch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from rankfold.errors import RankfoldError
from rankfold.optim import LoraFa, LoraPlus, LoraPro, LoraRite, Riemannian

STEPS = 3
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora_plus": (LoraPlus, {}), "lora_pro-full": (LoraPro, {}), "lora_pro-efficient": (LoraPro, {"mode": "efficient"}),
    "lora_rite": (LoraRite, {"clip": 0.1}), "lora_fa": (LoraFa, {}), "riemannian": (Riemannian, {}),
}  # fmt: skip


def start(seed: int = 1) -> Any:
    """In float64, so that two halves of a batch are as good as the whole."""
    return adapted(seed=seed, modules_to_save=["lm_head"], rank_pattern={"v_proj": 2}).double()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rows: slice) -> dict[str, Tensor]:
    for step in range(STEPS):
        optimizer.zero_grad()
        ids = batch(step)[rows]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return {n.removeprefix("module."): p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name, (cls, options) in CASES.items():
        model = start(seed=1 + rank)  # another one on every process: DDP brings them in line
        if cls is LoraFa:
            LoraFa(model)  # DDP must not wait for gradients of frozen factors
        wrapped = DistributedDataParallel(model)
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
