"""A first learning rate for a method, from how far its steps go compared with LoRA's.

OUR INTERPRETATION, of no paper: a search starts where twenty steps of the optimiser move the update as far, in the Frobenius norm, as twenty of
AdamW move that of LoRA with r = 8 and α/r = 2 at LoRA's own rate. Scale, gates, first values, pools and the optimiser's rule all count,
because real adapters take the steps: on square matrices, against one fixed random gradient each, in a stack as deep as the model.
docs/comparing.md holds the rule against the rates that comparisons chose.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from rankfold.errors import RankfoldError
from rankfold.host.config import LowRankConfig
from rankfold.methods.lora import PlainLoraConfig
from rankfold.optim.create import create
from rankfold.runfile.optimizers import row_of
from rankfold.tasks import table

#: Where nothing says how deep the model is, and what LoRA's rate is there.
LAYERS, LORA_RATE = 12, 2e-3
STEPS, WIDTH = 20, 64
#: LoRA's settings that the others are held against.
LORA_R, LORA_SCALE = 8, 2
_PLACE = ("target_modules", "exclude_modules", "target_parameters", "modules_to_save", "layers_to_transform", "layers_pattern",
          "rank_pattern", "alpha_pattern", "trainable_token_indices")  # fmt: skip


def lora_rate_of(task: str | None) -> float:
    """LoRA's rate where the run file of `rankfold init` for a task has it; without one, `LORA_RATE`."""
    return table.get(task).start["training"].get("learning_rate", LORA_RATE) if task else LORA_RATE


def first_rate(
    config: PeftConfig,
    *,
    lora_rate: float = LORA_RATE,
    layers: int = LAYERS,
    optimizer: str = "adamw_torch",
    options: dict[str, Any] | None = None,
) -> float:
    """The rate at which a method moves its update as far as LoRA at `lora_rate`, rounded to 1, 2 or 5 times a power of ten.

    Args:
        config: ours or PEFT's; where it is put, and ranks of single modules, do not count.
        lora_rate: AdamW's for LoRA with r = 8 and α/r = 2.
        layers: of the model, for methods that share among them.
        optimizer: as in a run file, with its `options`.

    Raises:
        RankfoldError: the steps of this method or optimiser cannot be measured.
    """
    return rounded(measured(config, lora_rate, layers, optimizer, options or {}))


def measured(config: PeftConfig, lora_rate: float, layers: int, optimizer: str, options: dict[str, Any]) -> float:
    """As `first_rate`, before it is rounded; to about 2 %."""

    def log_distance(config: PeftConfig, rate: float, optimizer: str, options: dict[str, Any]) -> float:
        far = distance(config, rate, layers, optimizer, options)
        if not 0 < far < math.inf:
            raise RankfoldError(
                f"{type(config).__name__}: no first rate: {STEPS} steps move its update by {far:g}; give rates"
            )
        return math.log(far)

    goal = log_distance(PlainLoraConfig(r=LORA_R, lora_alpha=LORA_R * LORA_SCALE), lora_rate, "adamw_torch", {})

    def excess(log_rate: float) -> float:
        return log_distance(config, math.exp(log_rate), optimizer, options) - goal

    # Secants, as the distance is nearly a power of the rate
    before, at = math.log(lora_rate), excess(math.log(lora_rate))
    log_rate = before - at
    for _ in range(8):
        now = excess(log_rate)
        if abs(now) < 0.02:
            return math.exp(log_rate)
        slope = (now - at) / (log_rate - before)
        if not slope > 0.05:  # it hardly goes farther at any rate
            break
        before, at, log_rate = log_rate, now, log_rate - max(min(now / slope, 3.0), -3.0)
    raise RankfoldError(
        f"{type(config).__name__}: no first rate: at none does its update move as far as LoRA's; give rates"
    )


def distance(config: PeftConfig, rate: float, layers: int, optimizer: str, options: dict[str, Any]) -> float:
    """How far the first steps move the update: the Frobenius norm, root mean square over the layers.

    Raises:
        RankfoldError: the method or the optimiser cannot take the steps.
    """
    width = max(WIDTH, getattr(config, "r", WIDTH))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), _one_thread():
        warnings.simplefilter("ignore")  # advice about training
        torch.manual_seed(0)
        gradients = torch.randn(layers, width, width)
        try:
            model = get_peft_model(_Stack(layers, width), _placed(config))  # pyright: ignore[reportArgumentType]
            stepper = _optimizer(optimizer, model, rate, options)
            seen = torch.eye(width)
            start = model(seen).detach()
            for _ in range(STEPS):
                stepper.zero_grad()
                (model(seen) * gradients).sum().backward()
                stepper.step()
            moved = model(seen).detach() - start
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RankfoldError(
                f"{type(config).__name__}: no first rate, as its steps cannot be measured ({reason}); give rates"
            ) from error
    return float(moved.norm() / math.sqrt(layers))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small wait for threads longer than they are multiplied, ten times as long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _placed(config: PeftConfig) -> PeftConfig:
    """The config for the stack below."""
    if isinstance(config, LowRankConfig):
        return config.for_another_model(target_modules=[_Block.name], lora_dropout=0.0, allow_unscheduled=True)
    other = copy.deepcopy(config)
    other.task_type = None
    for name in _PLACE:
        if hasattr(other, name):
            setattr(other, name, {} if name.endswith("_pattern") and name != "layers_pattern" else None)
    for name in [name for name in vars(other) if name.endswith("dropout")]:
        setattr(other, name, 0.0)
    setattr(other, "target_modules", {_Block.name})  # noqa: B010  (PeftConfig does not declare it)
    return other


def _optimizer(name: str, model: nn.Module, rate: float, options: dict[str, Any]) -> torch.optim.Optimizer:
    if row_of(name) is not None:
        return create(name, model, rate, **options)
    if not name.startswith("adamw"):
        raise RankfoldError(f"'{name}' is neither AdamW nor one of `rankfold optimizers`")
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)


class _Block(nn.Module):
    name = "linear"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)


class _Stack(nn.Module):
    """Layers beside each other, so that the gradient of each is what the loss says."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block(width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([block.linear(x) for block in self.layers])  # pyright: ignore[reportCallIssue]


# --- 1, 2, 5 ------------------------------------------------------------------------------------------------------------


def rounded(rate: float) -> float:
    """The nearest of 1, 2 and 5 times a power of ten, by ratio.

    >>> rounded(0.0028), rounded(0.0072), rounded(0.0071)
    (0.002, 0.01, 0.01)
    """
    return min(_series(rate), key=lambda x: abs(math.log(x / rate)))


def beyond(rate: float, *, up: bool) -> float:
    """The next of the series above or below a rate.

    >>> beyond(0.002, up=True), beyond(0.002, up=False), beyond(0.003, up=True)
    (0.005, 0.001, 0.005)
    """
    near = [x for x in _series(rate) if not math.isclose(x, rate)]
    return min(x for x in near if x > rate) if up else max(x for x in near if x < rate)


def _series(rate: float) -> list[float]:
    power = math.floor(math.log10(rate))
    return [float(f"{n}e{p}") for p in (power - 1, power, power + 1) for n in (1, 2, 5)]
