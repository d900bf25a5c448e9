"""SD-LoRA from one task to the next: KD's fit of a finished direction, freezing it, and beginning a new one.

    model = PeftModel.from_pretrained(base, "task-0", is_trainable=True)   # or the live model of the task before
    next_task(model)                                                       # then a new optimiser, and train task 1

The paper and the code are named in sd_lora.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rankfold.errors import RankfoldError
from rankfold.host.layer import AdaptedLayer
from rankfold.kernel.factors import Factors
from rankfold.methods.sd_lora import Magnitudes, SdLora, SdLoraConfig


@torch.no_grad()
def next_task(model: nn.Module, adapter_name: str = "default") -> SdLoraConfig:
    """Ends the current task and begins the next one: freezes the directions, begins new ones, and starts the magnitudes anew.

    The trained parameters are other tensors afterwards: make a new optimiser, and wrap for DDP or FSDP after this call.

    Args:
        model: a PeftModel, or one into which the adapter was injected.

    Returns:
        The adapter's config from now on.

    Raises:
        RankfoldError: no such adapter; earlier directions that are not known; merged, sharded or non-finite weights. Nothing is
            changed then.
    """
    config, adapters = _adapters(model, adapter_name)
    if config.kd:
        for adapter in adapters:
            _absorb(adapter)
    absorbed = {name: list(tasks) for name, tasks in config.absorbed.items()}
    for adapter in adapters:
        if adapter.up.any():
            _freeze(adapter)
        else:
            absorbed.setdefault(adapter.site.name, []).append(config.task)
    new = config.changed(task=config.task + 1, absorbed=absorbed)
    model.peft_config[adapter_name] = new  # pyright: ignore[reportIndexIssue, reportArgumentType]
    for adapter in adapters:
        adapter.start(new)
    magnitudes: Magnitudes = adapters[0].shared
    alpha = torch.full_like(magnitudes.alpha[:1], new.first_magnitude()).repeat(new.task + 1)
    if new.carry_alpha:
        alpha[:-1] = magnitudes.alpha
    magnitudes.alpha = nn.Parameter(alpha, magnitudes.alpha.requires_grad)
    return new


@torch.no_grad()
def absorb(model: nn.Module, adapter_name: str = "default") -> dict[str, float]:
    """KD after a task: gives every current direction that the earlier ones can stand in for to them, and makes it zero.

    `next_task` does it as well. Call it before that where the task's model is evaluated, saved or folded.

    Returns:
        The residual of the fit by module; directions have norm 1 (at most 1 with norm="code").

    Raises:
        RankfoldError: an adapter without `kd`; as `next_task`.
    """
    config, adapters = _adapters(model, adapter_name)
    if not config.kd:
        raise RankfoldError("SdLoraConfig: kd=False must be true for an adapter whose directions may be dropped")
    found = {adapter.site.name: _absorb(adapter) for adapter in adapters}
    return {name: residual for name, residual in found.items() if residual is not None}


def fit(direction: Factors, past: Sequence[Factors]) -> tuple[list[float], float]:
    """The c of argmin ‖D − Σ_k c_k D_k‖_F, and that norm, in float64 and without an out × in matrix."""
    parts = [f.detach().to("cpu", torch.float64).baked() for f in (*past, direction)]
    ranks = [f.rank for f in parts]
    up = torch.linalg.qr(torch.cat([f.up for f in parts], 1)).R.split(ranks, 1)
    down = torch.linalg.qr(torch.cat([f.down for f in parts]).T).R.split(ranks, 1)
    *columns, wanted = [(u @ d.T).flatten() for u, d in zip(up, down, strict=True)]
    matrix = torch.stack(columns, 1)
    found = torch.linalg.lstsq(matrix, wanted[:, None], driver="gelsd").solution[:, 0]
    return found.tolist(), (matrix @ found - wanted).norm().item()


def _absorb(adapter: SdLora) -> float | None:
    if not adapter.has_past or not adapter.up.any():
        return None
    config, tasks = adapter.rules, adapter.past_task.unique().tolist()
    norm = adapter.norm(config.norm).item()
    frozen = Factors(adapter.past_down, adapter.past_up, 1 / adapter.past_norm)
    coefficients, residual = fit(
        Factors(adapter.down, adapter.up, scale=1 / norm), [frozen.select(adapter.past_task == k) for k in tasks]
    )
    if (residual if config.kd_residual == "norm" else residual**2) <= config.kd_threshold:
        gate = adapter.blocks()[-1].gate
        assert gate is not None
        weight = gate[0].item() * norm if config.kd_update == "preserving" else 1.0
        for k, coefficient in zip(tasks, coefficients, strict=True):
            adapter.past_delta[adapter.past_task == k] += weight * coefficient
        adapter.up.zero_()
    return residual


def _freeze(adapter: SdLora) -> None:
    """Puts the current direction to the earlier ones, its bits as they are."""
    wide = torch.promote_types(adapter.up.dtype, torch.float32)
    norm = adapter.norm(adapter.rules.norm).repeat(adapter.r)
    task = torch.full_like(norm, adapter.rules.task, dtype=torch.int64)
    new = adapter.down.to(wide, copy=True), adapter.up.to(wide, copy=True), task, norm, torch.zeros_like(norm)
    if adapter.has_past:
        past = adapter.past_down, adapter.past_up, adapter.past_task, adapter.past_norm, adapter.past_delta
        new = [torch.cat([old, add], dim) for old, add, dim in zip(past, new, (0, 1, 0, 0, 0), strict=True)]
    adapter.remember(*new)


def _adapters(model: nn.Module, name: str) -> tuple[SdLoraConfig, list[SdLora]]:
    """The config and the adapters of one name; raises RankfoldError where they cannot be frozen."""
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    config = configs.get(name)
    if not isinstance(config, SdLoraConfig):
        raise RankfoldError(
            f"adapter_name={name!r} must be an SD-LoRA of the model, which has {', '.join(configs) or 'none'}; give the "
            "PeftModel itself, and not what wraps it"
        )
    layers = [m for m in model.modules() if isinstance(m, AdaptedLayer) and name in m.lowrank_adapters]
    if any(name in layer.merged_adapters for layer in layers):
        raise RankfoldError(f"adapter_name={name!r} is merged; call unmerge_adapter() first")
    adapters: list[Any] = [a for layer in layers for a in layer.adapters([name])]
    for adapter in adapters:
        tensors: tuple[Tensor, ...] = (adapter.down, adapter.up, adapter.shared.alpha)
        if any(isinstance(t, DTensor) for t in tensors):
            raise RankfoldError(
                f"{adapter.site.name} is sharded (FSDP2); save the whole model, load it, and go on there"
            )
        if not all(torch.isfinite(t).all() for t in tensors):
            raise RankfoldError(
                f"{adapter.site.name} has NaN or infinity: the task diverged, and no task can follow it"
            )
        adapter.blocks()  # raises where the earlier directions are not known
    return config, adapters
