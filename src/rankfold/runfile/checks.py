"""What a run file's schema cannot see: the fields of the method's own config, the trainer's names, fields that contradict."""

from __future__ import annotations

import copy
import dataclasses
import re
import typing
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from rankfold.errors import nearest, short
from rankfold.runfile.arguments import RENAMED, trainer_arguments
from rankfold.runfile.methods import SET_BY_THE_RUN, cannot_resume, config_class, config_fields, refuse
from rankfold.runfile.optimizers import check_optimizer
from rankfold.runfile.problems import Problem, allowed
from rankfold.runfile.schema import RunFile, Training
from rankfold.tasks import table

if TYPE_CHECKING:
    from peft import PeftConfig


def check(run: RunFile) -> list[Problem]:
    """Everything that is wrong with a run whose keys and types are right."""
    return [*_check_method(run), *_check_data(run), *_check_training(run)]


def peft_config(run: RunFile) -> PeftConfig:
    """The PEFT config of the run's method, task and revision of the model; the caller may change it.

    Raises:
        ValueError: a value that the config class refuses.
    """
    config = copy.deepcopy(run.method.config)
    config.task_type = table.get(run.task).peft_type
    config.revision = run.model.revision
    return config


def _check_method(run: RunFile) -> list[Problem]:
    from rankfold.host.field_types import bad_pattern

    name = run.method.name
    try:
        refuse(name)
        config = config_class(name)
    except ValueError as e:
        return [Problem(("method", "name"), str(e))]
    hints, known = typing.get_type_hints(config), config_fields(config)
    problems = []
    for key, value in run.method.fields.items():
        path = ("method", key)
        if key in SET_BY_THE_RUN:
            problems.append(Problem(path, "is set by the run itself; remove it"))
        elif key not in known:
            problems.append(Problem(path, f"'{name}' has no such field (value {short(value)}){nearest(key, known)}"))
        elif not _fits(value, hints[key]):
            problems.append(Problem(path, f"{short(value)} is not {allowed(hints[key])}"))
        elif why := bad_pattern(key, value):
            problems.append(Problem(path, why))
    if problems:
        return problems
    try:
        _ = run.method.config
    except (ValueError, TypeError) as e:
        # "SomeConfig: r=0 must be ..." names the field that the line number should point at.
        found = re.match(r"(?:\w+: )?(\w+)\b", str(e))
        path = ("method", found[1]) if found and found[1] in known else ("method",)
        return [Problem(path, str(e))]
    return []


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(value, str) and any("[" in str(choice) for choice in _choices(hint)):
        return True  # PEFT declares patterns as literals: 'pissa_niter_[number of iters]'
    try:
        TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_python(value)
    except PydanticUserError:
        return True  # a type of PEFT's with a config of its own: left to the config class
    except ValidationError:
        return False
    return True


def _choices(hint: Any) -> list[Any]:
    args = typing.get_args(hint)
    return list(args) if typing.get_origin(hint) is Literal else [c for arg in args for c in _choices(arg)]


def _check_data(run: RunFile) -> list[Problem]:
    d = run.data
    problems = []
    if d.source is None and d.train is None:
        problems.append(
            Problem(("data",), "needs source (a bundled name, file, folder or datasets name) or train (a file)")
        )
    shares = {key: getattr(d, key) for key in ("validation", "test") if isinstance(getattr(d, key), float)}
    for key, share in shares.items():
        if not 0 < share < 1:
            problems.append(Problem(("data", key), f"{share:g} is not a share of the training rows, between 0 and 1"))
    if not problems and sum(shares.values()) >= 1:
        problems.append(Problem(("data", "validation"), "validation and test together leave no row to train on"))
    known = [*table.columns(), *sorted(table.optional_columns())]
    for role, column in d.columns.names.items():
        if role not in known:
            message = f"unknown key (value {short(column)}){nearest(role, known)}"
            problems.append(Problem(("data", "columns", role), message))
    for key in table.get(run.task).foreign:
        if getattr(d, key) != type(d).model_fields[key].default:
            problems.append(Problem(("data", key), f"means nothing for {run.task}; remove it"))
    return problems


def _check_training(run: RunFile) -> list[Problem]:
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )
    from transformers.trainer_utils import SchedulerType

    t, task = run.training, table.get(run.task)
    problems = []

    def problem(key: str, message: str) -> None:
        problems.append(Problem(("training", key), message))

    schedules = [member.value for member in SchedulerType]
    if t.schedule not in schedules:
        problem("schedule", f"unknown schedule '{t.schedule}'{nearest(t.schedule, schedules, 'known')}")
    elif why := _why_no_schedule(t):
        problem("schedule", f"'{t.schedule}' needs more: {why}; give it in extra: {{lr_scheduler_kwargs: {{...}}}}")
    problems += check_optimizer(run)
    trackers = [t.report_to] if isinstance(t.report_to, str) else t.report_to
    for name in trackers:
        if name not in INTEGRATION_TO_CALLBACK and name not in ("none", "all"):
            problem("report_to", f"unknown tracker '{name}'{nearest(name, INTEGRATION_TO_CALLBACK, 'known')}")
        elif name in INTEGRATION_TO_CALLBACK and name not in get_available_reporting_integrations():
            problem("report_to", f"the tracker '{name}' is not installed; install it or remove it here")
    if t.epochs is not None and t.max_steps is not None:
        problem("max_steps", f"{t.max_steps} contradicts epochs: {t.epochs:g}; give one of the two")
    if t.metric is not None and t.metric not in task.metrics:
        problem("metric", f"'{t.metric}' is not a metric of {run.task}{nearest(t.metric, task.metrics, 'known')}")
    if isinstance(t.evaluate_every, int) and t.evaluate_every < 1:
        problem("evaluate_every", f"{t.evaluate_every} is not allowed, should be greater than 0")
    last_only = cannot_resume(run.method.name, run.method.fields)
    if t.keep_best and last_only:
        problem(
            "keep_best",
            f"'{run.method.name}' cannot go back to a checkpoint: PEFT keeps in none what it chooses its ranks by; remove it, "
            "or use one of `rankfold methods`",
        )
    if t.early_stopping and not run.keeps_best:
        has = "cannot have" if last_only else "has off by default"
        problem("early_stopping", f"{t.early_stopping} needs keep_best: true, which '{run.method.name}' {has}")
    if t.extra and not problems:
        arguments = task.arguments_class()
        known = {f.name for f in dataclasses.fields(arguments) if f.init}
        unread = task.unread(t.extra)
        ours = {*trainer_arguments(run, validated=True), *RENAMED.values(), *task.own_arguments}
        for key in t.extra:
            if key in ours:
                problem("extra", f"'{key}' follows from the run file's own fields; use those")
            elif key in unread:
                problem("extra", f"'{key}' would not be read; {unread[key]}")
            elif key not in known:
                problem("extra", f"{arguments.__name__} has no argument '{key}'{nearest(key, known - ours)}")
    return problems


def _why_no_schedule(t: Training) -> str:
    """What transformers says of a schedule that it cannot make, which is else known when training begins; "" of any other."""
    from torch import nn, optim
    from transformers import get_scheduler

    optimizer, options = optim.SGD([nn.Parameter()], t.learning_rate), t.extra.get("lr_scheduler_kwargs")
    if isinstance(options, str):  # TrainingArguments reads JSON in it
        return ""
    try:
        get_scheduler(t.schedule, optimizer, 0, 1_000_000, options)
    except (ValueError, TypeError) as e:
        return str(e)
    return ""
