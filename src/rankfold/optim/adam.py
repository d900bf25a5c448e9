"""Adam's arithmetic, by torch's own kernels: one pass over memory where the device has a fused one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from rankfold.optim.stacks import Batch, Shapes

#: Devices with torch's fused Adam.
FUSED = ("cpu", "cuda", "mps", "xpu")


def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
) -> None:
    """One AdamW step, in place: p ← (1 − lr·wd)·p − lr·m̂/(√v̂ + eps).

    Args:
        step: which step this is, from 1.
    """
    fused = params[0].device.type in FUSED
    steps = [torch.full((), step - 1.0, device=p.device if fused else "cpu") for p in params]
    kernel: dict[str, Any] = {"fused": True} if fused else {"foreach": True}
    adamw(
        params, grads, exp_avgs, exp_avg_sqs, [], steps, **kernel, amsgrad=False, maximize=False,
        beta1=betas[0], beta2=betas[1], lr=lr, weight_decay=weight_decay, eps=eps,
    )  # fmt: skip


def moments(out: int, in_: int, r: int) -> Shapes:
    """Adam's two moments of both factors."""
    down, up = (r, in_), (out, r)
    return {"exp_avg_down": down, "exp_avg_sq_down": down, "exp_avg_up": up, "exp_avg_sq_up": up}


def adam_on_both_(batch: Batch, g_down: Tensor, g_up: Tensor, group: dict[str, Any]) -> None:
    """AdamW's step of both factors, in place, on these gradients; its state is `moments`."""
    kept = batch.state
    adam_(
        [batch.down, batch.up], [g_down, g_up],
        [kept["exp_avg_down"], kept["exp_avg_up"]], [kept["exp_avg_sq_down"], kept["exp_avg_sq_up"]],
        batch.step, lr=group["lr"], betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
    )  # fmt: skip


def plain_adamw(params: list[Tensor], state: Any, group: dict[str, Any]) -> None:
    """torch.optim.AdamW's step on those of `params` that have a gradient; `state` and `group` are an optimiser's."""
    found = [p for p in params if p.grad is not None]
    if not found:
        return
    for p in found:
        if not state[p]:
            state[p] |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    beta1, beta2 = group["betas"]
    remembered = [[state[p][k] for p in found] for k in ("exp_avg", "exp_avg_sq", "step")]
    adamw(
        found, [p.grad for p in found if p.grad is not None], remembered[0], remembered[1], [], remembered[2], foreach=None, fused=None,
        capturable=False, differentiable=False, has_complex=False, amsgrad=False, maximize=False,
        beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
    )  # pyright: ignore[reportArgumentType]  # fmt: skip
