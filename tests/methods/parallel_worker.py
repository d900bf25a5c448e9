"""Run by test_table_parallel.py as one of two programs: trains every row with DDP and with FSDP2 over gloo.

python parallel_worker.py RANK FOLDER   writes FOLDER/<case>.<rank>.safetensors
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from models import GPT2, LLAMA, Arch
from moe_models import MOE
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from table import FIRST, LIVE, ROWS, Row, adapt, adapter_buffers, adapter_parameters, in_turn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rankfold import attach

STEPS = 3
#: case name → what it runs; the parent reads the same table
CASES: dict[str, tuple[str, Arch, Row]] = (
    {
        f"{how}-{arch.name}-{row}": (how, arch, row)
        for how, some_rows in (("ddp", ROWS), ("ddp_checkpointed", FIRST), ("fsdp", ROWS))
        for arch, row in in_turn(how, (LLAMA, GPT2), some_rows)
    }
    | {f"{how}-llama-{row}": (how, LLAMA, row) for how in ("ddp", "ddp_checkpointed", "fsdp") for row in LIVE}
    | {
        f"ddp_unused-{row}": ("ddp_unused", LLAMA, replace(row, kwargs={**row.kwargs, "layers_drawn": 1}))
        for row in FIRST
        if row.facts.method == "xgblora"
    }
    | {  # an expert may meet a token on one process, on both or on none
        f"ddp_unused-experts-{row}": (
            "ddp_unused",
            MOE,
            replace(row, kwargs={**row.kwargs, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
        )
        for row in FIRST[:2]
    }
)


def cutting(row: Row) -> Row:
    """With a budget below the start, where there is one: both processes must cut the same ranks."""
    return replace(row, kwargs={**row.kwargs, "target_r": 2}) if "target_r" in row.kwargs else row


def start(arch: Arch, row: Row, rank: int) -> nn.Module:
    """Another adapter on every rank, so that one that is not brought in line shows."""
    return adapt(arch, cutting(row), lora_dropout=0.0, seed=2 + rank).train()


def train(arch: Arch, model: nn.Module, ranks: tuple[int, ...]) -> dict[str, Tensor]:
    """`STEPS` on these ranks' share of batches of 4 rows; the losses, first gradients and last parameters."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    attach(model, optimizer, total_steps=STEPS)
    found = {}
    for step in range(STEPS):
        batch = {k: torch.cat([v[2 * r : 2 * r + 2] for r in ranks]) for k, v in arch.inputs(rows=4, seed=step).items()}
        optimizer.zero_grad()
        loss = arch.loss(model, batch)
        loss.backward()
        found[f"loss.{step}"] = loss.detach().clone()
        if step == 0:
            found |= {f"grad.{clean(n)}": whole(p.grad) for n, p in adapter_parameters(model) if p.grad is not None}
        optimizer.step()
    buffers = {
        n: b for n, b in adapter_buffers(model).items() if not n.endswith("_norms")
    }  # of this process's own rows
    found |= {f"frozen.{clean(n)}": b.clone() for n, b in buffers.items()}
    return found | {f"last.{clean(n)}": whole(p) for n, p in adapter_parameters(model)}


def clean(name: str) -> str:
    return name.removeprefix("module.")


def whole(t: Tensor) -> Tensor:
    t = t.detach()
    return (t.full_tensor() if isinstance(t, DTensor) else t).clone()


def run(how: str, arch: Arch, row: Row, rank: int) -> dict[str, Tensor]:
    if how == "fsdp":
        model = start(arch, row, 0)
        blocks = model.get_base_model()
        for block in blocks.model.layers if arch.name == "llama" else blocks.transformer.h:
            fully_shard(block)
        fully_shard(model)
        found = train(arch, model, (rank,))
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_peft_model_state_dict(model, state_dict=get_model_state_dict(model, options=options))
        return found | {f"saved.{k}": v.clone() for k, v in state.items()}
    model = start(arch, row, rank)
    if how == "ddp_checkpointed":
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    return train(arch, DistributedDataParallel(model, find_unused_parameters=how == "ddp_unused"), (rank,))


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name, case in CASES.items():
        try:
            save_file(run(*case, rank), folder / f"{name}.{rank}.safetensors")
        except Exception as error:
            print(f"FAILED {name}", flush=True)  # the other rank is waiting: nothing after this can be trusted
            raise SystemExit(f"{name}: {type(error).__name__}: {error}") from error
    dist.destroy_process_group()
