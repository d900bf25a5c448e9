"""SD-LoRA: one task after another, each with a low-rank direction of its own; old directions are frozen, all magnitudes trained.

Paper: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning, arXiv 2501.13198 (ICLR 2025). In task t:

    ΔW = Σ_{k<t} (α_k + δ_k) · B_kA_k/n_k  +  α_t · B_tA_t

α is one vector for the whole network, B_t and A_t are of one layer; both are trained, everything of earlier tasks but α is
frozen. From the paper, `norm="paper"`: n_k = ‖B_kA_k‖_F and α = 1 at the start of every task. From the authors' code,
`norm="code"`, which made the released runs: n_k = ‖B_k‖_F‖A_k‖_F and α = 0.8. Both: Kaiming A_t, B_t = 0, no α/r.
RR is `rank_schedule`, KD is `kd`: after a task, B_tA_t/n_t is fitted by the earlier directions, and where the residual is at
most τ, its coefficients go into δ and the direction is dropped.

OUR INTERPRETATION: the current direction is not divided by its norm, as in the code; the paper's form would start at 0/0.
`normalise_current` divides it by max(‖B_tA_t‖_F, 1e-8). A direction that is zero when its task ends is dropped. δ, which
LibContinual keeps per layer too, survives the new start of α. `carry_alpha` and `kd_update="preserving"` deviate from both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rankfold.errors import RankfoldError
from rankfold.host.config import LowRankConfig, is_number, is_whole
from rankfold.host.layer import AdaptedLayer
from rankfold.host.registry import Method, register
from rankfold.methods.sd_lora_adapter import SdLora

#: α at the start of a task.
FIRST_MAGNITUDE = {"paper": 1.0, "code": 0.8}


@dataclass
class SdLoraConfig(LowRankConfig):
    """SD-LoRA, SD-LoRA-RR and SD-LoRA-KD (arXiv 2501.13198).

    Args:
        norm: "paper" or "code", by which a direction is divided.
        rank_schedule: RR: from which task on (the first is 0) which rank; ranks never rise. The code's is {4: 8, 8: 6} with
            r=10, the paper's equation 6 {3: 8, 7: 6}.
        normalise_current: divide the current direction by its norm too.
        magnitude: α at the start of every task; None: 1 ("paper") or 0.8 ("code").
        carry_alpha: keep the magnitudes of earlier tasks instead of starting them anew. A deviation from paper and code.
        kd: fit each finished direction by the earlier ones, and drop it where they suffice.
        kd_threshold: τ, the largest residual that suffices.
        kd_residual: "norm", as Algorithm 1 prints, or "sq", its square, which LibContinual compares.
        kd_update: "literal", Algorithm 1's α_k + Δα_k; or "preserving", which keeps the function that was trained.
        lora_alpha: not used; the magnitudes take its place.
        task, absorbed: written by `next_task`: the number of the current task, and by module the tasks whose direction was
            dropped. Not for you to set.
    """

    method: ClassVar[str] = "sd_lora"
    note: ClassVar[str] = (
        "counted in its first task; every further one adds a frozen direction, folded at the sum of ranks"
    )
    lora_alpha: float = field(default=8, metadata={"help": "Not used: the magnitudes take its place."})
    norm: str = field(
        default="paper", metadata={"help": 'A direction\'s norm: "paper", ||BA||, or "code", ||B|| ||A||.'}
    )
    rank_schedule: dict[int, int] = field(
        default_factory=dict, metadata={"help": "RR: from which task on (the first is 0) which rank."}
    )
    normalise_current: bool = field(default=False, metadata={"help": "Divide the current direction by its norm too."})
    magnitude: float | None = field(default=None, metadata={"help": "Magnitudes at the start of a task; by norm."})
    carry_alpha: bool = field(default=False, metadata={"help": "Keep earlier tasks' magnitudes (not in the paper)."})
    kd: bool = field(default=False, metadata={"help": "Drop a direction that the earlier ones can stand in for."})
    kd_threshold: float = field(default=9e-4, metadata={"help": "tau: the largest residual of that fit."})
    kd_residual: str = field(default="norm", metadata={"help": '"norm" of the residual, or "sq", its square.'})
    kd_update: str = field(default="literal", metadata={"help": '"literal", or "preserving" for the same function.'})
    task: int = field(default=0, metadata={"help": "Written by next_task: the current task. Not for you to set."})
    absorbed: dict[str, list[int]] = field(
        default_factory=dict, metadata={"help": "Written by next_task: what KD dropped. Not for you to set."}
    )

    def __post_init__(self) -> None:
        self.rank_schedule, self.absorbed = self.rank_schedule or {}, self.absorbed or {}
        if isinstance(self.rank_schedule, dict):  # JSON has no integer keys
            self.rank_schedule = {int(k) if str(k).isdecimal() else k: v for k, v in self.rank_schedule.items()}
        super().__post_init__()

    def check(self) -> None:
        super().check()
        self.require("use_rslora", self.use_rslora, not self.use_rslora, "false: the magnitudes take the scale's place")
        self.require("alpha_pattern", self.alpha_pattern, not self.alpha_pattern, "empty: lora_alpha is not used")
        self.require("norm", self.norm, self.norm in FIRST_MAGNITUDE, '"paper" or "code"')
        given = self.magnitude is None or is_number(self.magnitude)
        self.require("magnitude", self.magnitude, given, "a number, or null for the start by norm")
        self.require("kd_residual", self.kd_residual, self.kd_residual in ("norm", "sq"), '"norm" or "sq"')
        self.require(
            "kd_update", self.kd_update, self.kd_update in ("literal", "preserving"), '"literal" or "preserving"'
        )
        self.require("kd_threshold", self.kd_threshold, self.kd_threshold >= 0, "a number >= 0")
        self.require("task", self.task, is_whole(self.task) and self.task >= 0, "an integer >= 0")
        tasks, ranks = list(self.rank_schedule), list(self.rank_schedule.values())
        fits = all(is_whole(t) and t > 0 for t in tasks) and all(is_whole(r) and r > 0 for r in ranks)
        fits = fits and tasks == sorted(tasks) and ranks == sorted(ranks, reverse=True)
        self.require(
            "rank_schedule", self.rank_schedule, fits, "tasks 1, 2, … in their order, with ranks > 0 that never rise"
        )

    def rank_in(self, task: int, module: str) -> int:
        """The rank of one task's direction at a module."""
        return min([self.rank_at(module), *(r for first, r in self.rank_schedule.items() if first <= task)])

    def past_tasks(self, module: str) -> list[int]:
        """The task of every frozen component at a module."""
        kept = [k for k in range(self.task) if k not in self.absorbed.get(module, ())]
        return [k for k in kept for _ in range(self.rank_in(k, module))]

    def first_magnitude(self) -> float:
        return FIRST_MAGNITUDE[self.norm] if self.magnitude is None else self.magnitude


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
    config, layers, adapters = _adapters(model, adapter_name)
    if config.kd:
        for adapter in adapters:
            adapter.absorb()
    absorbed = {name: list(tasks) for name, tasks in config.absorbed.items()}
    for adapter in adapters:
        if adapter.up.any():
            adapter.freeze()
        else:
            absorbed.setdefault(adapter.site.name, []).append(config.task)
    new = config.changed(task=config.task + 1, absorbed=absorbed)
    model.peft_config[adapter_name] = new  # pyright: ignore[reportIndexIssue, reportArgumentType]
    for adapter in adapters:
        adapter.start(new)
    for layer in layers:
        held: Any = layer.lowrank_adapters[adapter_name]
        held.tensor_names = tuple(held.state_dict())
    adapters[0].shared.start(new)
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
    config, _, adapters = _adapters(model, adapter_name)
    if not config.kd:
        raise RankfoldError("SdLoraConfig: kd=False must be true for an adapter whose directions may be dropped")
    found = {adapter.site.name: adapter.absorb() for adapter in adapters}
    return {name: residual for name, residual in found.items() if residual is not None}


def end_task(model: nn.Module, adapter_name: str = "default") -> None:
    """`absorb` for an adapter with `kd`, and nothing for another."""
    if _adapters(model, adapter_name)[0].kd:
        absorb(model, adapter_name)


def _adapters(model: nn.Module, name: str) -> tuple[SdLoraConfig, list[AdaptedLayer], list[SdLora]]:
    """The config, the layers and the adapters of one name, those of tied heads left out; raises RankfoldError where they cannot be frozen."""
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
    adapters = [a for layer in layers for a in layer.adapters([name]) if isinstance(a, SdLora)]
    for adapter in adapters:
        tensors = (adapter.down, adapter.up, adapter.shared.alpha)
        if any(isinstance(t, DTensor) for t in tensors):
            raise RankfoldError(
                f"{adapter.site.name} is sharded (FSDP2); save the whole model, load it, and go on there"
            )
        if not all(torch.isfinite(t).all() for t in tensors):
            raise RankfoldError(
                f"{adapter.site.name} has NaN or infinity: the task diverged, and no task can follow it"
            )
        adapter.blocks()  # raises where the earlier directions are not known
    return config, layers, adapters


SD_LORA = register(
    Method(
        name="sd_lora",
        title="SD-LoRA",
        paper="2501.13198",
        summary="One task after another: frozen directions, trained magnitudes.",
        config=SdLoraConfig,
        adapter=SdLora,
        folds_at="sum of r_k",
        next_task=next_task,
        end_task=end_task,
    )
)
