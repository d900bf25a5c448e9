"""A live model's adapter as a plain LoRA in memory: what an engine takes at each sync of reinforcement learning.

lora = fold_state_dict(model)             # {"base_model.model.….q_proj.lora_A.weight": rank × in, …}
lora.config                               # its adapter_config.json
lora.save("folder")                       # where the engine reads files
lora = fold_state_dict(model, out=lora)   # the next sync, into the same memory
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rankfold.errors import RankfoldError
from rankfold.fold import native, peft_adapters
from rankfold.fold.lora_tensors import Layout, check_kinds
from rankfold.fold.profiles import uniform
from rankfold.fold.source import Source
from rankfold.host.config import LowRankConfig
from rankfold.io.files import to_json, whole_folder
from rankfold.kernel.factors import Factors


class FoldedStateDict(dict[str, Tensor]):
    """The tensors of a plain LoRA by PEFT's names.

    Args:
        config: its adapter_config.json.
        rank: of every module.
        compressed: relative error of each module whose rank had to be cut, by name.
    """

    config: dict[str, object]
    rank: int
    compressed: dict[str, float]

    def save(self, folder: str | Path) -> None:
        """Writes the folder that engines and PEFT load: adapter_config.json and adapter_model.safetensors.

        Raises:
            FileExistsError: the folder exists and is not empty.
            RankfoldError: values that are not finite.
        """
        for key, tensor in self.items():
            if not tensor.isfinite().all():
                raise RankfoldError(f"{key} has NaN or infinity: the model has diverged; lower the learning rate")
        with whole_folder(Path(folder)) as partial:
            tensors = {key: tensor.cpu().contiguous() for key, tensor in self.items()}
            save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
            (partial / "adapter_config.json").write_text(to_json(self.config), encoding="utf-8")


def fold_state_dict(
    model: nn.Module,
    *,
    adapter_name: str = "default",
    max_rank: int = uniform.SERVE_RANKS[-1],
    dtype: torch.dtype | None = None,
    out: FoldedStateDict | None = None,
) -> FoldedStateDict:
    """Folds an adapter of a live model in memory, without a proof. The model is not changed.

    Every module gets one rank that engines name in their flags, lora_alpha equals it, and gates and scales lie in
    `lora_B`. Components whose gate is 0 are left out. `fold_model` writes the same update to disk, with its proof.

    Args:
        max_rank: modules of a higher rank are compressed to it, as well as that rank can; engines take 512 at most.
        dtype: of the tensors; by default the base's.
        out: what an earlier call returned for this model; its tensors are overwritten and returned.

    Returns:
        Tensors on the adapter's device: `lora_A` rank × in, `lora_B` out × rank, and heads of modules_to_save.

    Raises:
        RankfoldError: as `fold_model`; max_rank < 1.
    """
    if max_rank < 1:
        raise RankfoldError(f"fold_state_dict: max_rank={max_rank} must be an integer > 0")
    config = getattr(model, "peft_config", {}).get(adapter_name)
    with torch.no_grad():
        if isinstance(config, LowRankConfig | None):
            # A checkpoint's tensors are read only where some of them are heads
            heads = None if getattr(config, "modules_to_save", None) else {}
            source = native.from_model(model, adapter_name, heads)
        else:
            source = peft_adapters.from_model(model, adapter_name)
        source = replace(source, sites=[*source.sites, *source.siblings])
        check_kinds(source, "uniform")
        updates = {name: _live_blocks(source, name) for name in source.adapted}
        found = FoldedStateDict() if out is None else out
        found.compressed = {}
        for name, blocks in updates.items():
            if _rank(blocks) > max_rank:
                updates[name], found.compressed[name] = _compressed(blocks, max_rank)
        found.rank = min(uniform.serve_rank(max(map(_rank, updates.values()), default=0)), max_rank)
        base = source.config.base_model_name_or_path
        found.config = {**uniform.config(source, found.rank), "base_model_name_or_path": base}
        _fill(found, source, updates, source.dtype if dtype is None else dtype)
    return found


def _live_blocks(source: Source, name: str) -> Sequence[Factors]:
    """A module's update as it lies on the model, without the components that a gate has pruned."""
    if source.blocks is None:
        update = source.update(name)
        if isinstance(update, Tensor):
            raise RankfoldError(
                f"{source.method}: its update is not a product of small matrices; fold it with fold_model(rank=N)"
            )
        return [update]
    return [b if b.gate is None or b.gate.all() else b.select(b.gate != 0) for b in source.blocks(name)]


def _rank(blocks: Sequence[Factors]) -> int:
    return sum(block.rank for block in blocks)


def _compressed(blocks: Sequence[Factors], rank: int) -> tuple[Sequence[Factors], float]:
    """The best update of that rank, and its relative error."""
    first, *rest = blocks
    _, sigma, _ = (whole := first.concat(*rest)).svd()
    lost = float(sigma[rank:].norm() / sigma.norm()) if sigma.any() else 0.0
    return [whole.compress(rank)], lost


def _fill(out: FoldedStateDict, source: Source, updates: dict[str, Sequence[Factors]], dtype: torch.dtype) -> None:
    """Writes every module's factors, rounded once, zeros behind them up to the rank."""
    layout = Layout(source.sites)
    devices = {layout.of[name]: blocks[0].up.device for name, blocks in updates.items() if blocks}
    some = next(iter(devices.values()))
    shapes = {name: layout.shapes(name, out.rank) for name in layout.stacks}
    for key in out.keys() - {key for both in shapes.values() for key in both}:
        del out[key]
    for name, both in shapes.items():
        for key, shape in both.items():
            out[key] = _memory(out.get(key), shape, dtype, devices.get(name, some))
    for site in source.sites:
        (down, up), start = layout.views(site.name, out), 0
        for block in updates.get(site.name, ()):
            end = start + block.rank
            down[start:end] = block.down
            gain = block.scale if block.gate is None else block.gate * block.scale
            torch.mul(block.up, gain, out=up[:, start:end])
            start = end
        down[start:].zero_()
        up[:, start:].zero_()
    out.update({key: head.detach().to(dtype, copy=True) for key, head in source.heads.items()})


def _memory(held: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor of an earlier call where it fits, else a new one."""
    if held is not None and held.shape == shape and held.dtype == dtype and held.device == device:
        return held
    return torch.empty(shape, dtype=dtype, device=device)
