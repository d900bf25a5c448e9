"""A plan of costs for the terminal: a table of at most 100 columns, and the notes below it."""

from __future__ import annotations

from rich.console import Group
from rich.text import Text

from rankfold import text
from rankfold.pages import cite
from rankfold.plan.cost_plan import CostPlan, Row
from rankfold.plan.folding import Fold


def table(plan: CostPlan) -> Group:
    """One row per method, those that cannot run last, and notes below."""
    t = text.table()
    t.add_column("method", no_wrap=True)
    t.add_column("ranks", no_wrap=True)
    for name in ("trained", "stored", "folded", "serve at", _state(plan), "FLOPs", "+back"):
        t.add_column(name, justify="right", no_wrap=True)
    if plan.budget:
        t.add_column("budget", justify="right", no_wrap=True)
    for row in plan.rows:
        if row.cost:
            t.add_row(*_cells(row, bool(plan.budget)))
    return Group(Text(_title(plan), style="bold"), t, *(Text(line, style="dim") for line in _below(plan)))


def _cells(row: Row, with_share: bool) -> list[str]:
    c = row.cost
    assert c is not None
    fold = c.fold if isinstance(c.fold, Fold) else None
    return [
        row.label,
        row.ranks,
        f"{c.trained:,}",
        text.count(c.stored),
        text.count(fold.parameters) if fold else "–",
        _serve(fold, falls=c.trained_at_end is not None) if fold else "–",
        text.size(c.optimizer_bytes),
        *(("–", "–") if c.flops is None else (f"{share:.3%}" if share < 0.1 else f"{share:.1%}" for share in c.flops)),
        *([f"{row.share:.1%}"] if with_share and row.share is not None else []),
    ]


def _serve(fold: Fold, falls: bool) -> str:
    rank = f"≤{fold.rank}" if falls else str(fold.rank)
    return rank if fold.rank == fold.served and not falls else f"{rank} → {fold.served}"


def _state(plan: CostPlan) -> str:
    """The heading of the optimiser's bytes."""
    return "state" if plan.optimizer else "AdamW"


def _title(plan: CostPlan) -> str:
    b = plan.base
    bytes_ = "bytes unknown" if b.bytes is None else text.size(b.bytes)
    targets = plan.targets if isinstance(plan.targets, str) else ",".join(plan.targets)
    title = f"{plan.model}: {b.architecture}, {b.parameters:,} parameters, {bytes_}; adapters on {targets}"
    title += f"\nstate: of {plan.optimizer}" if plan.optimizer else ""
    return f"{title}\nbudget: {plan.budget:,} trained parameters in the adapter" if plan.budget else title


def _below(plan: CostPlan) -> list[str]:
    heads = {row.cost.head for row in plan.rows if row.cost}
    said: dict[str, list[str]] = {}
    for row in plan.rows:
        no_fold = [row.cost.fold] if row.cost and isinstance(row.cost.fold, str) else []
        for note in [row.reason, *no_fold, *row.notes]:
            if note:
                said.setdefault(note, []).append(row.label)
    able = [row.label for row in plan.rows if row.cost]
    lines = [note if labels == able else f"{', '.join(labels)}: {note}" for note, labels in said.items()]
    if max(heads) > 0:
        lines.append(
            f"beside every adapter a head of {max(heads):,} parameters is trained; stored and {_state(plan)} hold it"
        )
    return [
        *lines,
        *plan.base.notes,
        "folded: parameters of the LoRA of `rankfold fold`, padded to the rank after the arrow (vLLM's --max-lora-rank)",
        f"FLOPs: adapter over base for a token, forward; +back: forward and backward ({cite('planning')})",
    ]
