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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from rankfold.errors import RankfoldError
from rankfold.host.adapter import Adapter, Group, Shared, Site, kaiming_
from rankfold.host.config import LowRankConfig, is_number, is_whole
from rankfold.host.registry import Method, register
from rankfold.kernel.factors import Factors

EPS = 1e-8
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
        # JSON has no integer keys
        self.rank_schedule = {int(k) if str(k).isdecimal() else k: v for k, v in (self.rank_schedule or {}).items()}
        self.absorbed = self.absorbed or {}
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


class Magnitudes(Shared):
    """α of all tasks, for the whole network."""

    def __init__(self, config: SdLoraConfig) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((config.task + 1,), config.first_magnitude()))

    def forward(self) -> Tensor:
        """α; a call, so that accelerate's hooks fetch it where it is offloaded."""
        return self.alpha


class SdLora(Adapter):
    """The components of all earlier directions stand one behind the other; for each, `past_task` is its task k, `past_norm` n_k and
    `past_delta` δ_k. None of these exists before there is a direction."""

    past_down: Tensor  # R × in
    past_up: Tensor  # out × R
    past_task: Tensor  # R, int64
    past_norm: Tensor  # R
    past_delta: Tensor  # R

    def __init__(self, config: SdLoraConfig, site: Site, shared: Magnitudes) -> None:
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
    def group_key(cls, config: SdLoraConfig, site: Site) -> str | None:
        return "magnitudes"

    @classmethod
    def make_shared(cls, config: SdLoraConfig, group: Group) -> Magnitudes:
        return Magnitudes(config)

    def reset_parameters(self, init: bool | str) -> None:
        kaiming_(self.down)
        if init:
            nn.init.zeros_(self.up)
        else:
            kaiming_(self.up)

    def blocks(self) -> Sequence[Factors]:
        if not self.knows_past:
            raise RankfoldError(
                f"SdLoraConfig: task={self.rules.task}, but the earlier directions at {self.site.name} are not known; load the "
                "adapter of the task before with PeftModel.from_pretrained(..., is_trainable=True) and call "
                "rankfold.methods.sd_lora_tasks.next_task(model)"
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

    def start(self, config: SdLoraConfig) -> None:
        """A new current direction, of the rank of the config's task."""
        self.config = self.rules = config
        self.r, trained = config.rank_in(config.task, self.site.name), self.up.requires_grad
        self.down = nn.Parameter(self.down.new_empty(self.r, self.site.in_features), trained)
        self.up = nn.Parameter(self.up.new_empty(self.site.out_features, self.r), trained)
        self.reset_parameters(True)
        self.tensor_names = tuple(self.state_dict())

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


SD_LORA = register(
    Method(
        name="sd_lora",
        title="SD-LoRA",
        paper="2501.13198",
        summary="One task after another: frozen directions, trained magnitudes.",
        config=SdLoraConfig,
        adapter=SdLora,
        folds_at="sum of r_k",
    )
)
