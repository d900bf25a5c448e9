"""The data of a cost plan: one row per method, the facts they rest on, and both as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from peft import PeftConfig

from rankfold.plan.base_facts import BaseFacts
from rankfold.plan.cost import Cost
from rankfold.plan.folding import Fold
from rankfold.plan.peft_methods import NEEDED
from rankfold.runfile.methods import config_class, config_fields
from rankfold.runfile.yaml import write


@dataclass(frozen=True)
class Row:
    """One method of a plan.

    Args:
        method: its fields as a run file writes them.
        ranks: its rank settings in a few letters.
        cost: None where it cannot run or cannot meet the budget, and `reason` says why.
        share: of the budget, if there is one.
        config: where it can run, with its ranks.
        first_rate: a learning rate to begin with, where `lora_rate` is LoRA's; None where it was not asked or cannot be measured.
    """

    label: str
    method: dict[str, Any]
    ranks: str = ""
    cost: Cost | None = None
    share: float | None = None
    reason: str | None = None
    notes: list[str] = field(default_factory=list)
    config: PeftConfig | None = None
    first_rate: float | None = None
    lora_rate: float | None = None

    def run_file(self) -> str:
        """The section `method:` of a run file, and the learning rate to begin with."""
        lines = write({"method": self.method})
        for key, (value, help) in _still_needed(self.method["name"]).items():
            if key not in self.method:
                lines += f"  {key}: {value}  # {help}\n"
        if self.first_rate is not None:
            lines += f"# training.learning_rate {self.first_rate:g} to begin with, where LoRA's at alpha/r = 2 is {self.lora_rate:g}\n"
        return lines

    def to_dict(self) -> dict[str, Any]:
        known: dict[str, Any] = {}
        if (c := self.cost) is not None:
            fold = c.fold if isinstance(c.fold, Fold) else None
            known = {
                "trained": c.trained,
                "trained_at_end": c.trained_at_end,
                "live": c.live,
                "cumulative": c.cumulative,
                "head": c.head,
                "stored": c.stored,
                "optimizer_bytes": c.optimizer_bytes,
                "flops": None if c.flops is None else {"forward": c.flops[0], "training": c.flops[1]},
                "folded": c.folded,
                "folded_rank": c.folded_rank,
                "serve": fold and {"rank": fold.served, "vllm": fold.flag},
                "no_fold": None if fold else c.fold,
            }
        about = {
            "label": self.label,
            "method": self.method,
            "share": self.share,
            "reason": self.reason,
            "first_rate": self.first_rate,
        }
        return {**about, **known, "notes": self.notes, "run_file": self.run_file() if self.cost else None}


def _still_needed(name: str) -> dict[str, tuple[Any, str]]:
    """What a run file must add: a value to stand there, and what it means."""
    examples = {
        key: (field.metadata["example"], field.metadata.get("help", ""))
        for key, field in config_fields(config_class(name)).items()
        if "example" in field.metadata
    }
    return {**examples, **NEEDED.get(name, {})}


@dataclass(frozen=True)
class CostPlan:
    """All rows, and the facts they rest on. `optimizer` is the one whose state is counted; None: AdamW."""

    model: str
    task: str | None
    base: BaseFacts
    targets: list[str] | str
    budget: int | None
    rows: list[Row]
    optimizer: str | None = None

    def to_json(self) -> str:
        about = {"format": "rankfold-plan-1", "model": self.model, "task": self.task, "base": asdict(self.base)}
        rows = [row.to_dict() for row in self.rows]
        values = {**about, "targets": self.targets, "budget": self.budget, "optimizer": self.optimizer, "methods": rows}
        return json.dumps(values, indent=2) + "\n"
