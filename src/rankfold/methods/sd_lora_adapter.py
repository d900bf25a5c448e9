"""SD-LoRA's adapter: the current direction of one layer, the frozen ones of earlier tasks, and what becomes of the current one when
its task ends. What follows what is in sd_lora.py, which has the config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from rankfold.errors import RankfoldError
from rankfold.host.adapter import Adapter, Group, Shared, Site, first_pair_
from rankfold.kernel.factors import Factors

#: The least norm that a direction is divided by.
EPS = 1e-8


class Magnitudes(Shared):
    """α of all tasks, for the whole network."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((config.task + 1,), config.first_magnitude()))

    def forward(self) -> Tensor:
        """α; a call, so that accelerate's hooks fetch it where it is offloaded."""
        return self.alpha

    def start(self, config: Any) -> None:
        """The magnitudes at the start of the config's task."""
        alpha = self.alpha.new_full((config.task + 1,), config.first_magnitude())
        if config.carry_alpha:
            alpha[:-1] = self.alpha
        self.alpha = nn.Parameter(alpha, self.alpha.requires_grad)


class SdLora(Adapter):
    """The components of all earlier directions stand one behind the other; for each, `past_task` is its task k, `past_norm` n_k and
    `past_delta` δ_k. None of these exists before there is a direction."""

    past_down: Tensor  # R × in
    past_up: Tensor  # out × R
    past_task: Tensor  # R, int64
    past_norm: Tensor  # R
    past_delta: Tensor  # R

    def __init__(self, config: Any, site: Site, shared: Magnitudes) -> None:
        super().__init__(config, site, shared)
        self.rules = config
        self.r, self.scaling = config.rank_in(config.task, site.name), 1.0
        self.down = nn.Parameter(torch.empty(self.r, site.in_features))  # A_t
        self.up = nn.Parameter(torch.empty(site.out_features, self.r))  # B_t
        tasks = torch.tensor(config.past_tasks(site.name), dtype=torch.int64)
        #: Whether the earlier directions have their values, which only a file and `next_task` can give.
        self.knows_past = not len(tasks)
        if len(tasks):
            rank = len(tasks)
            down, up = torch.zeros(rank, site.in_features), torch.zeros(site.out_features, rank)
            self.remember(down, up, tasks, torch.ones(rank), torch.zeros(rank))

    def remember(self, *past: Tensor) -> None:
        for name, tensor in zip(("down", "up", "task", "norm", "delta"), past, strict=True):
            self.register_buffer(f"past_{name}", tensor)

    @property
    def has_past(self) -> bool:
        return "past_task" in self._buffers

    @classmethod
    def group_key(cls, config: Any, site: Site) -> str | None:
        return "magnitudes"

    @classmethod
    def make_shared(cls, config: Any, group: Group) -> Magnitudes:
        return Magnitudes(config)

    def reset_parameters(self, init: bool | str) -> None:
        first_pair_(self.down, self.up, self.site, random=not init)

    def blocks(self) -> Sequence[Factors]:
        if not self.knows_past:
            raise RankfoldError(
                f"SdLoraConfig: task={self.rules.task}, but the earlier directions at {self.site.name} are not known; load the "
                "adapter of the task before with PeftModel.from_pretrained(..., is_trainable=True) and call "
                "rankfold.methods.sd_lora.next_task(model)"
            )
        alpha = self.shared().to(self.down.device)
        current = alpha[self.rules.task]
        if self.rules.normalise_current:
            current = current / self.norm("paper")
        blocks = [Factors(self.down, self.up, current.repeat(self.r))]
        if self.has_past:
            gate = (alpha[self.past_task] + self.past_delta) / self.past_norm
            blocks.insert(0, Factors(self.past_down, self.past_up, gate))
        return blocks

    def norm(self, form: str) -> Tensor:
        """n_t of the current direction, at least 1e-8, in float32 or wider; ‖BA‖_F out of two r × r products."""
        wide = torch.promote_types(self.up.dtype, torch.float32)
        up, down = self.up.to(wide), self.down.to(wide)
        if form == "code":
            return (up.norm() * down.norm()).clamp_min(EPS)
        return ((up.T @ up) * (down @ down.T)).sum().clamp_min(EPS**2).sqrt()

    # From one task to the next ----------------------------------------------------------------------------------------

    def absorb(self) -> float | None:
        """KD: gives the current direction to the earlier ones where they suffice, and makes it zero. Returns the residual of the
        fit; None where there is nothing to fit."""
        if not self.has_past or not self.up.any():
            return None
        config, tasks = self.rules, self.past_task.unique().tolist()
        norm = self.norm(config.norm).item()
        frozen = Factors(self.past_down, self.past_up, 1 / self.past_norm)
        coefficients, residual = fit(
            Factors(self.down, self.up, scale=1 / norm), [frozen.select(self.past_task == k) for k in tasks]
        )
        if (residual if config.kd_residual == "norm" else residual**2) <= config.kd_threshold:
            gate = self.blocks()[-1].gate
            assert gate is not None
            weight = gate[0].item() * norm if config.kd_update == "preserving" else 1.0
            for k, coefficient in zip(tasks, coefficients, strict=True):
                self.past_delta[self.past_task == k] += weight * coefficient
            self.up.zero_()
        return residual

    def freeze(self) -> None:
        """Puts the current direction to the earlier ones, its bits as they are."""
        wide = torch.promote_types(self.up.dtype, torch.float32)
        norm = self.norm(self.rules.norm).repeat(self.r)
        task = torch.full_like(norm, self.rules.task, dtype=torch.int64)
        new = self.down.to(wide, copy=True), self.up.to(wide, copy=True), task, norm, torch.zeros_like(norm)
        if self.has_past:
            past = self.past_down, self.past_up, self.past_task, self.past_norm, self.past_delta
            new = [torch.cat([old, add], dim) for old, add, dim in zip(past, new, (0, 1, 0, 0, 0), strict=True)]
        self.remember(*new)

    def start(self, config: Any) -> None:
        """A new current direction, of the rank of the config's task."""
        self.config = self.rules = config
        self.r, trained = config.rank_in(config.task, self.site.name), self.up.requires_grad
        self.down = nn.Parameter(self.down.new_empty(self.r, self.site.in_features), trained)
        self.up = nn.Parameter(self.up.new_empty(self.site.out_features, self.r), trained)
        self.reset_parameters(True)

    # Files and casts --------------------------------------------------------------------------------------------------

    def check_state(self, state: dict[str, Tensor]) -> None:
        if self.has_past and state["past_task"].tolist() != self.rules.past_tasks(self.site.name):
            raise RankfoldError(
                f"The checkpoint of this sd_lora adapter has the directions of tasks {state['past_task'].unique().tolist()} at "
                f"{self.site.name}, which its config (task={self.rules.task}, absorbed={self.rules.absorbed}) does not say"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.knows_past = self.knows_past or prefix + "past_task" in state_dict

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Earlier directions are kept as they are when a model is cast to half precision."""
        frozen = {id(b) for b in self._buffers.values()}

        def keep_past_wide(t: Tensor) -> Tensor:
            out = fn(t)
            return t.to(out.device) if id(t) in frozen and out.dtype.itemsize < 4 else out

        return super()._apply(keep_past_wide, recurse)


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
