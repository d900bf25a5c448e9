"""A controller acts around the optimiser's step: the schedule of one adapter.

    class Prune(Controller):
        def after_step(self, optimizer):
            ...self.adapters..., self.step, self.state

It runs after `optimizer.step()` and before `zero_grad()`, once per real step, whatever the loop.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from rankfold.errors import RankfoldError
from rankfold.host.adapter import Adapter
from rankfold.host.config import LowRankConfig

A = TypeVar("A", bound=Adapter)
C = TypeVar("C", bound=LowRankConfig)


class Controller(Generic[A, C]):
    """Base of every method's controller.

    Args:
        config: the adapter's config.
        adapters: its adapters in the model's order; the order is part of the state.
        total_steps: optimiser steps of the whole run, where known.

    Raises:
        ValueError: a schedule that does not fit `total_steps`.
    """

    #: Whether `extra_loss` depends on the factors. An optimiser that reads the update's gradient off theirs cannot be used then.
    penalises_factors: ClassVar[bool] = False

    def __init__(self, config: C, adapters: Sequence[A], total_steps: int | None) -> None:
        self.config, self.adapters, self.total_steps = config, list(adapters), total_steps
        #: Everything that must survive a kill: plain values, and tensors in float32 or wider. It travels in the optimiser's
        #: own state dict (see attach.py), so any loop that resumes its optimiser resumes the schedule.
        self.state: dict[str, Any] = {"step": 0, "sites": [a.site.name for a in self.adapters]}

    @property
    def step(self) -> int:
        """Optimiser steps taken so far."""
        return self.state["step"]

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are final (accumulated, reduced over processes, unscaled, clipped); parameters are old."""

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Parameters are new; gradients are still there. `self.step` counts this step already."""

    def extra_loss(self) -> Tensor | None:
        """A regulariser of the parameters alone. Its gradient is added just before the optimiser's step, once per real
        step and after clipping; None where there is none."""
        return None

    def release(self) -> None:
        """Called when it is detached: what it changed about the adapters, other than their values, is as before."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Adopts a saved state; raises ValueError where it is another adapter's."""
        if state.get("sites") != self.state["sites"]:
            raise RankfoldError(
                f"{type(self).__name__}: the optimiser's checkpoint holds the schedule of {len(state.get('sites', ()))} "
                f"modules, and this model has {len(self.adapters)} others; resume with the config it was saved with"
            )
        try:
            self.state = _fitted(self.state, state)
        except ValueError as e:
            raise RankfoldError(
                f"{type(self).__name__}: the optimiser's checkpoint holds the schedule of another method, rank or version "
                f"({e}); resume with the config it was saved with"
            ) from e

    def ranks(self) -> dict[str, int]:
        """Module name to the rank that is alive now, for logs and pictures."""
        return {a.site.name: a.alive() for a in self.adapters}

    def progress(self) -> dict[str, Any]:
        """What the adapter's config records, so that a fold knows the schedule ran."""
        return {"step": self.step, "total_steps": self.total_steps, "finished": self.finished()}

    def finished(self) -> bool:
        """Whether the ranks are final: stopping now loses nothing of the method."""
        return True


def run_length(config: Any, total_steps: int | None) -> int:
    """Steps of a schedule: the config's `total_step`, else the run's; raises ValueError where neither is known."""
    steps = config.total_step or total_steps
    if not steps or steps < 1:
        raise RankfoldError(
            f"{type(config).__name__}: total_step is not known; give it in the config or to attach(total_steps=...)"
        )
    if total_steps and steps > total_steps:
        warnings.warn(
            f"{type(config).__name__}: total_step={steps} is longer than the run of {total_steps} steps, so the ranks will "
            "not reach target_r; leave total_step out, or train longer",
            stacklevel=2,
        )
    return steps


def _fitted(now: Any, saved: Any, where: str = "state") -> Any:
    """`saved` on the devices of `now`; raises ValueError where it is not built alike."""
    if isinstance(now, Tensor):
        if not isinstance(saved, Tensor) or saved.shape != now.shape:
            raise RankfoldError(f"{where} is not of shape {tuple(now.shape)}")
        return saved.to(now.device, now.dtype)
    if isinstance(now, dict):
        if not isinstance(saved, dict) or saved.keys() != now.keys():
            raise RankfoldError(f"{where} does not have {', '.join(now)}")
        return {k: _fitted(v, saved[k], f"{where}.{k}") for k, v in now.items()}
    if isinstance(now, list):
        if not isinstance(saved, list) or len(saved) != len(now):
            raise RankfoldError(f"{where} does not have {len(now)} entries")
        return [_fitted(v, s, f"{where}[{i}]") for i, (v, s) in enumerate(zip(now, saved, strict=True))]
    return saved


def finite(name: str, t: Tensor) -> Tensor:
    """`t`, or a FloatingPointError that says which quantity of the schedule went bad."""
    if not torch.isfinite(t).all():
        raise FloatingPointError(
            f"{name} is not finite: a gradient or a weight is NaN or infinite, and a schedule fed with it would prune at "
            "random. Lower the learning rate, clip gradients, or use bf16 instead of fp16."
        )
    return t
