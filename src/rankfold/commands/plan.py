"""`rankfold plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankfold.commands import gelora
from rankfold.commands.command import CommonOptions, group, names, option
from rankfold.errors import RankfoldError
from rankfold.tasks.table import TASKS


@dataclass(kw_only=True)
class Options(CommonOptions):
    """say what each method costs on a model, as it is or at one budget; loads no weights"""

    model: str = option("a folder with a config.json, GGUF file, bundled name or hub id")
    method: list[str] | None = option(
        "only these, as in rasa, peft:dora or lora:r=4,use_rslora=true, with their part of a run file; "
        "gelora: see below",
        default=None,
        nargs="+",
        action="extend",
        metavar="NAME",
    )
    targets: list[str] | None = option(
        "ends of module names (default: every linear layer; gelora: the matrices of attention)",
        default=None,
        type=names,
        metavar="A,B",
    )
    task: str | None = option("default: what the config names", default=None, choices=TASKS)
    r: int | None = option("rank of every method (default: 8)", default=None, metavar="N")
    budget: str | None = option(
        "solve for the ranks that train at most N parameters, such as 1.2M", default=None, metavar="N", either="budget"
    )
    budget_of: str | None = option(
        "the same, at what this method trains: lora:r=8", default=None, metavar="NAME:r=N", either="budget"
    )
    optimizer: str | None = option(
        "count the state of this one of `rankfold optimizers`, such as lora_pro:mode=efficient (default: AdamW)",
        default=None,
        metavar="NAME",
    )
    labels: int | None = option("classes of a classification head (default: 2)", default=None, metavar="N")
    revision: str | None = option("branch, tag or commit of a hub model", default=None)
    json: bool = option("print JSON instead of the table", default=False)
    gelora: dict[str, Any] = group(
        "--method gelora", "choose ranks from the intrinsic dimensions of your texts", gelora.Measure
    )


def run(options: Options) -> int:
    costs = {n: v for n in _OF_COSTS if (v := getattr(options, n)) is not None}
    if options.method == ["gelora"]:
        if costs:
            raise RankfoldError(f"{_flag(costs)} is not of --method gelora; leave one of the two out")
        if "data" not in options.gelora:
            raise RankfoldError("--method gelora measures your texts: give --data (as data.source in a run file)")
        return gelora.run(
            gelora.Options(model=options.model, targets=options.targets, json=options.json, **options.gelora)
        )
    if options.gelora:
        raise RankfoldError(
            f"{_flag(options.gelora)} is of --method gelora, which chooses ranks from your texts; add it, or leave this out"
        )
    from rankfold.plan.costs import run_costs

    run_costs(options.model, methods=options.method, targets=options.targets, json=options.json, **costs)
    return 0


_OF_COSTS = ("task", "r", "budget", "budget_of", "optimizer", "labels", "revision")


def _flag(given: dict[str, Any]) -> str:
    return "--" + next(iter(given)).replace("_", "-")
