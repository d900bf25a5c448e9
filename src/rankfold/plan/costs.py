"""`rankfold plan`: what each method costs on a model, as it is or at one budget, before any weight is loaded."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml
from peft import PeftConfig
from torch import nn

from rankfold.errors import RankfoldError
from rankfold.fold.profiles.uniform import SERVE_RANKS
from rankfold.plan.base_facts import Base, describe
from rankfold.plan.basis import NOTE, PlannedCoraConfig
from rankfold.plan.contenders import Contender, chosen, parse
from rankfold.plan.cost import Cost, cost, trained
from rankfold.plan.folding import Fold
from rankfold.plan.match import match, parse_budget
from rankfold.plan.meta import meta_model
from rankfold.plan.ranks import named, setting

RANK = 8
"""Where neither a rank nor a budget is given."""
ALL = "all-linear"


@dataclass(frozen=True)
class Row:
    """One method of a plan.

    Args:
        method: its fields as a run file writes them.
        cost: None where it cannot run or cannot meet the budget, and `reason` says why.
        share: of the budget, if there is one.
    """

    label: str
    method: dict[str, Any]
    cost: Cost | None = None
    share: float | None = None
    reason: str | None = None
    notes: list[str] = field(default_factory=list)

    def run_file(self) -> str:
        """The section `method:` of a run file."""
        lines = yaml.safe_dump({"method": self.method}, sort_keys=False, width=120)
        if self.method["name"] == "cora" and "basis" not in self.method:
            lines += "  basis: bases/qkv.safetensors  # build it with rankfold subspace\n"
        if self.method["name"] == "peft:adalora" and "total_step" not in self.method:
            lines += "  total_step: 1000  # the optimiser steps of your run\n"
        return lines

    def to_dict(self) -> dict[str, Any]:
        known: dict[str, Any] = {}
        if (c := self.cost) is not None:
            fold = c.fold if isinstance(c.fold, Fold) else None
            known = {
                "trained": c.trained,
                "trained_at_end": c.trained_at_end,
                "head": c.head,
                "stored": c.stored,
                "optimizer_bytes": c.optimizer_bytes,
                "flops": None if c.flops is None else {"forward": c.flops[0], "training": c.flops[1]},
                "folded": c.folded,
                "folded_rank": c.folded_rank,
                "serve": fold and {"rank": fold.served, "vllm": fold.flag},
                "no_fold": None if fold else c.fold,
            }
        about = {"label": self.label, "method": self.method, "share": self.share, "reason": self.reason}
        return {**about, **known, "notes": self.notes, "run_file": self.run_file() if self.cost else None}


@dataclass(frozen=True)
class CostPlan:
    """All rows, and what they stand on."""

    model: str
    task: str | None
    base: Base
    targets: list[str] | str
    budget: int | None
    rows: list[Row]

    def to_json(self) -> str:
        about = {"format": "rankfold-plan-1", "model": self.model, "task": self.task, "base": asdict(self.base)}
        rows = [row.to_dict() for row in self.rows]
        values = {**about, "targets": self.targets, "budget": self.budget, "methods": rows}
        return json_module.dumps(values, indent=2) + "\n"


def run_costs(
    model: str,
    *,
    task: str | None = None,
    methods: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    r: int | None = None,
    budget: str | None = None,
    budget_of: str | None = None,
    labels: int = 2,
    revision: str | None = None,
    json: bool = False,
) -> CostPlan:
    """Prints what each method costs on `model`.

    Args:
        model: a folder with a config.json, GGUF file, bundled name or hub id.
        task: its name; by default what the config names.
        methods: as `contenders.parse` reads them; by default all of ours and the best known of PEFT's.
        targets: ends of module names; by default every linear layer but the output head.
        r: rank of every method, where its own fields give none.
        budget: trained numbers in the adapter, such as "1.2M": ranks are solved for it.
        budget_of: the same, as what this method trains: "lora:r=8".
        labels: classes of a classification head.
        json: print the plan as JSON instead of the table.

    Raises:
        ValueError: what is wrong, in one line; also a budget that no method can meet.
    """
    contenders = chosen(methods)
    if r is not None and (budget or budget_of):
        raise RankfoldError("--r and a budget contradict each other: a budget solves for the ranks")
    if r is not None and r < 1:
        raise RankfoldError(f"--r {r} must be an integer > 0")
    limit = _limit(budget)
    yardstick = parse(budget_of) if budget_of else None
    base = meta_model(model, task, revision, labels)
    where = _targets(targets)
    if yardstick is not None:
        limit = trained(base, yardstick.with_rank(RANK).config(base, task, where))
    rows = [_row(base, c.with_rank(r or RANK), task, where, limit) for c in contenders]
    plan = CostPlan(model, task, describe(base), where, limit, rows)
    if not any(row.cost for row in rows):
        raise RankfoldError(_none(rows, limit))
    if json:
        print(plan.to_json(), end="")
        return plan
    from rich.console import Console

    from rankfold.plan.show import table

    console = Console()
    console = console if console.is_terminal else Console(width=max(console.width, 100))
    console.print(table(plan))
    if methods:
        for row in rows:
            if row.cost:
                print(f"\n# {row.label}, for a run file\n{row.run_file()}", end="")
    return plan


def _limit(budget: str | None) -> int | None:
    try:
        return parse_budget(budget) if budget else None
    except ValueError as error:
        raise RankfoldError(f"--budget {error}") from None


def _targets(given: Sequence[str] | None) -> list[str] | str:
    return ALL if not given or list(given) == [ALL] else list(given)


def _row(base: nn.Module, contender: Contender, task: str | None, targets: list[str] | str, limit: int | None) -> Row:
    method = {"name": contender.name, "target_modules": targets, **contender.fields}
    full = False
    try:
        config = contender.config(base, task, targets)
        if limit is None or not _solvable(config):
            found, share = cost(base, config), None
            if limit is not None:
                share = found.trained / limit
                if share > 1:
                    return Row(contender.label, method, reason=_too_large(config, found.trained, limit))
        else:
            solved = match(base, config, limit)
            config, found, share, full = solved.config, solved.cost, solved.share, solved.full
    except ValueError as error:
        return Row(contender.label, method, reason=str(error))
    notes = list(found.notes)
    if full:
        notes.append("it cannot be larger on this model: its rank is full")
    if isinstance(found.fold, Fold) and found.fold.served > SERVE_RANKS[-1]:
        notes.append(
            f"folds to more than rank {SERVE_RANKS[-1]}, the largest that vLLM takes; compress it with fold --rank"
        )
    if isinstance(config, PlannedCoraConfig):
        notes.append(NOTE)
    if found.trained_at_end is not None:
        notes.append(f"its ranks fall: {found.trained_at_end:,} of its numbers are left at the target")
    if contender.name == "sora":
        notes.append("its threshold decides how many ranks are left; counted with all of them")
    return Row(contender.label, {**method, **named(config)}, found, share, notes=notes)


def _solvable(config: PeftConfig) -> bool:
    try:
        setting(config)
    except ValueError:
        return False
    return True


def _too_large(config: PeftConfig, spent: int, limit: int) -> str:
    return f"{type(config).__name__}: trains {spent:,} numbers as it is, and has no rank that the budget could lower"


def _none(rows: list[Row], limit: int | None) -> str:
    budget = f"no method can meet the budget of {limit:,} parameters" if limit else "no method can run on this model"
    return f"{budget}; {rows[0].label}: {rows[0].reason}"
