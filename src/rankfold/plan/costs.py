"""`rankfold plan`: what each method costs on a model, as it is or at one budget, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from peft import PeftConfig
from torch import nn

from rankfold.errors import RankfoldError
from rankfold.fold.profiles.uniform import SERVE_RANKS
from rankfold.host.config import LowRankConfig
from rankfold.plan.base_facts import describe
from rankfold.plan.candidates import Candidate, chosen, parse
from rankfold.plan.cost import cost, trained
from rankfold.plan.cost_plan import CostPlan, Row
from rankfold.plan.first_rate import LAYERS, first_rate, lora_rate_of
from rankfold.plan.folding import Fold
from rankfold.plan.match import match, parse_budget
from rankfold.plan.meta import meta_model
from rankfold.plan.optimizer import PlannedOptimizer
from rankfold.plan.ranks import in_words, named, setting
from rankfold.plan.show import table
from rankfold.text import terminal

RANK = 8
"""Where neither a rank nor a budget is given."""
ALL = "all-linear"


def run_costs(
    model: str,
    *,
    task: str | None = None,
    methods: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    r: int | None = None,
    budget: str | None = None,
    budget_of: str | None = None,
    optimizer: str | None = None,
    labels: int = 2,
    revision: str | None = None,
    json: bool = False,
) -> CostPlan:
    """Prints what each method costs on `model`.

    Args:
        model: a folder with a config.json, GGUF file, bundled name or hub id.
        task: its name; by default what the config names.
        methods: as `candidates.parse` reads them; by default all of ours and the best known of PEFT's.
        targets: ends of module names; by default every linear layer except the output head.
        r: rank of every method, where its own fields give none.
        budget: trained parameters of the adapter, such as "1.2M": ranks are solved for it.
        budget_of: the same, as what this method trains: "lora:r=8".
        optimizer: whose state is counted, as `PlannedOptimizer.parse` reads it; by default AdamW.
        labels: classes of a classification head.
        json: print the plan as JSON instead of the table.

    Raises:
        ValueError: what is wrong, in one line; also a budget that no method can meet.
    """
    candidates = chosen(methods)
    planned = PlannedOptimizer.parse(optimizer) if optimizer else None
    if r is not None and (budget or budget_of):
        raise RankfoldError("--r and a budget contradict each other: a budget solves for the ranks")
    for flag, number in (("r", r), ("labels", labels)):
        if number is not None and number < 1:
            raise RankfoldError(f"--{flag} {number} must be an integer > 0")
    if targets is not None and not targets:
        raise RankfoldError("--targets names no module; give ends of names, such as q_proj,v_proj, or leave it out")
    limit = _limit(budget)
    yardstick = None if budget_of is None else parse(budget_of)
    base = meta_model(model, task, revision, labels)
    where = _targets(targets)
    if yardstick is not None:
        limit = trained(base, yardstick.with_rank(RANK).config(base, task, where))
    rows = [_row(base, c.with_rank(r or RANK), task, where, limit, planned) for c in candidates]
    if methods:
        rows = [_with_first_rate(row, base, task, planned) for row in rows]
    plan = CostPlan(model, task, describe(base), where, limit, rows, optimizer)
    if not any(row.cost for row in rows):
        raise RankfoldError(_none(rows, limit))
    if json:
        print(plan.to_json(), end="")
        return plan
    terminal(least=100).print(table(plan))
    if methods:
        for row in rows:
            if row.cost:
                print(f"\n# {row.label}, for a run file\n{row.run_file()}", end="")
    return plan


def _limit(budget: str | None) -> int | None:
    try:
        return None if budget is None else parse_budget(budget)
    except ValueError as error:
        raise RankfoldError(f"--budget {error}") from None


def _targets(given: Sequence[str] | None) -> list[str] | str:
    return ALL if not given or list(given) == [ALL] else list(given)


def _row(
    base: nn.Module,
    candidate: Candidate,
    task: str | None,
    targets: list[str] | str,
    limit: int | None,
    optimizer: PlannedOptimizer | None,
) -> Row:
    method = {"name": candidate.name, "target_modules": targets, **candidate.fields}
    full = False
    try:
        config = candidate.config(base, task, targets)
        if limit is None or not _solvable(config):
            found, share = cost(base, config, optimizer), None
            if limit is not None:
                share = found.trained / limit
                if share > 1:
                    return Row(candidate.label, method, reason=_too_large(config, found.trained, limit))
        else:
            solved = match(base, config, limit, optimizer)
            config, found, share, full = solved.config, solved.cost, solved.share, solved.full
    except ValueError as error:
        return Row(candidate.label, method, reason=str(error))
    notes = list(found.notes)
    if full:
        notes.append("it cannot be larger on this model: its rank is full")
    if isinstance(found.fold, Fold) and found.fold.served > SERVE_RANKS[-1]:
        notes.append(
            f"folds to more than rank {SERVE_RANKS[-1]}, the largest that vLLM takes; compress it with fold --rank"
        )
    if found.trained_at_end is not None:
        notes.append(f"its ranks fall: {found.trained_at_end:,} of its parameters are left at the target")
    if found.live is not None:
        end = "as many for each part that the run has time for" if found.cumulative is None else f"{found.cumulative:,}"
        notes.append(f"live: at most {found.live:,} of its parameters are trained at a time; cumulative: {end}")
    if isinstance(config, LowRankConfig) and config.note:
        notes.append(config.note)
    return Row(candidate.label, {**method, **named(config)}, in_words(config), found, share, notes=notes, config=config)


def _with_first_rate(row: Row, base: nn.Module, task: str | None, optimizer: PlannedOptimizer | None) -> Row:
    """The row with a learning rate to begin with, where the method's steps can be measured."""
    if row.config is None:
        return row
    lora_rate = lora_rate_of(task)
    config: Any = base.config
    text = config.get_text_config()
    try:
        rate = first_rate(
            row.config,
            lora_rate=lora_rate,
            layers=getattr(text, "num_hidden_layers", None) or LAYERS,
            optimizer=optimizer.row.name if optimizer else "adamw_torch",
            options=optimizer.options if optimizer else {},
        )
    except RankfoldError:
        return row
    return replace(row, first_rate=rate, lora_rate=lora_rate)


def _solvable(config: PeftConfig) -> bool:
    try:
        setting(config)
    except ValueError:
        return False
    return True


def _too_large(config: PeftConfig, spent: int, limit: int) -> str:
    return f"{type(config).__name__}: trains {spent:,} parameters as it is, and has no rank that the budget could lower"


def _none(rows: list[Row], limit: int | None) -> str:
    budget = f"no method can meet the budget of {limit:,} parameters" if limit else "no method can run on this model"
    return f"{budget}; {rows[0].label}: {rows[0].reason}"
