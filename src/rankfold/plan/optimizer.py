"""The optimiser of a plan: one of `rankfold optimizers`, whose state is counted instead of AdamW's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from rankfold.optim.registry import OptimizerRow, get
from rankfold.plan.candidates import written


@dataclass(frozen=True)
class PlannedOptimizer:
    """An optimiser with options.

    Args:
        label: as the command line has it.
    """

    label: str
    row: OptimizerRow
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> PlannedOptimizer:
        """An optimiser as the command line writes it: NAME, or NAME:option=value,…; raises RankfoldError for anything else."""
        name, _, given = text.partition(":")
        row, options = get(name), written(text, given, "lora_pro:mode=efficient")
        row.check(**options)
        return cls(text, row, options)

    def state_bytes(self, model: nn.Module) -> int:
        """What it keeps for an adapted model, whose factors it freezes where it does not train them.

        Raises:
            RankfoldError: it cannot train the model's adapter.
        """
        self.row.cls.take(model)
        return self.row.state_bytes_of(model, **self.options)
