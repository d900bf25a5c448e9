"""What a run file may say of the optimiser: a name of transformers', or one of `rankfold optimizers` with its options."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from rankfold.errors import RankfoldError, nearest, short
from rankfold.runfile.problems import Problem

if TYPE_CHECKING:
    from rankfold.optim.registry import OptimizerRow
    from rankfold.runfile.schema import RunFile, Training

#: transformers' own default; where an optimiser of ours does not take clipping, there is none by default.
CLIP = 1.0
#: Fields of the run file that are options of every optimiser, and TrainingArguments that only transformers' optimisers read.
OWN_FIELDS = {"lr": "learning_rate", "weight_decay": "weight_decay"}
OF_TRANSFORMERS = {"adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps", "optim_args": "", "optim_target_modules": ""}  # fmt: skip


def row_of(name: str) -> OptimizerRow | None:
    """The optimiser of that name, or None for one that is not rankfold's or a third party's."""
    from rankfold.optim import registry

    return registry.get(name) if registry.known(name) else None


def options_of(training: Training) -> dict[str, Any]:
    """The options of one of our optimisers, weight decay included."""
    return {"weight_decay": training.weight_decay, **training.optimizer_options}


def clip_norm(training: Training) -> float:
    """The norm to which gradients are clipped; 0 for no clipping."""
    if training.max_grad_norm is not None:
        return training.max_grad_norm
    row = row_of(training.optimizer)
    return CLIP if row is None or row.check(**options_of(training)).takes_clipping else 0.0


def check_optimizer(run: RunFile) -> list[Problem]:
    """What is wrong with the optimiser of a run, and what contradicts it."""
    from transformers.training_args import OptimizerNames

    from rankfold.optim.registry import OPTIMIZERS

    t, row = run.training, row_of(run.training.optimizer)
    if row is None:
        names = [member.value for member in OptimizerNames]
        if t.optimizer not in names:
            hint = nearest(t.optimizer, [*OPTIMIZERS, *names], "known")
            return [Problem(("training", "optimizer"), f"unknown optimizer '{t.optimizer}'{hint}")]
        if t.optimizer_options:
            ours = ", ".join(OPTIMIZERS)
            message = f"are for {ours}; '{t.optimizer}' takes its own from extra (adam_beta1, adam_epsilon, optim_args)"
            return [Problem(("training", "optimizer_options"), message)]
        return []
    return [*_check_options(row, t), *_check_extra(row, t), *_check_method(row, run)]


def _check_options(row: OptimizerRow, t: Training) -> list[Problem]:
    for name, field in OWN_FIELDS.items():
        if name in t.optimizer_options:
            message = f"is training.{field}; set it there and remove it here"
            return [Problem(("training", "optimizer_options", name), message)]
    try:
        row.check(**options_of(t))
    except RankfoldError as e:
        # "LoraRite: clip=-1 must be ..." and "LoraRite: option clp=1 is not known" name the field of the line number
        named = re.match(r"\w+: (?:option )?(\w+)=", str(e))
        field = named[1] if named else ""
        path = ("training", "weight_decay") if field == "weight_decay" else ("training", "optimizer_options", field)
        return [Problem(path, str(e))]
    return []


def _check_extra(row: OptimizerRow, t: Training) -> list[Problem]:
    """Arguments of TrainingArguments that the trainer would not read, so that none is ignored in silence."""
    problems = []
    for key in sorted(t.extra.keys() & OF_TRANSFORMERS):
        option = OF_TRANSFORMERS[key]
        fix = f"use optimizer_options: {{{option}: ...}}" if option else "remove it"
        problems.append(
            Problem(("training", "extra", key), f"{short(t.extra[key])} is not read by '{row.name}'; {fix}")
        )
    return problems


def _check_method(row: OptimizerRow, run: RunFile) -> list[Problem]:
    from rankfold.host import registry

    method = registry.METHODS.get(run.method.name)
    if row.cls.joint and method is not None and getattr(method.controller, "penalises_factors", False):
        message = (
            f"'{row.name}' cannot train {method.title}, whose loss has a penalty on the factors that it would take for the update's "
            "gradient; use lora_plus or adamw_torch"
        )
        return [Problem(("training", "optimizer"), message)]
    return []
