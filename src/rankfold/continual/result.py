"""What tasks in a row gave: the matrix of scores and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankfold.continual.measures import Measures
from rankfold.text import decimals

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class ContinualResult:
    """The tasks that are trained so far; continual.json has the same.

    Args:
        metric: of the matrix.
        measured_on: the split: test, or else validation.
        next_task: what a further task trained.
        tasks: what tells each one from the others, the ones to come included.
        matrix: by trained task, the metric on each task up to it.
        adapter: of all tasks: the last one's folder, or with `fresh` the sum of all; None before there is one.
        notes: sentences for the reader.
    """

    output: str
    model: str
    task: str
    method: dict[str, Any]
    next_task: str
    metric: str
    greater_is_better: bool
    measured_on: str
    tasks: list[str]
    matrix: list[list[float]]
    adapter: str | None
    notes: list[str]

    @property
    def measures(self) -> Measures:
        return Measures.of(self.matrix, self.greater_is_better)

    def table(self) -> Table:
        """A row after each task, a column for each task's rows."""
        from rankfold.text import table

        found = table(f"after task, {self.measured_on} {self.metric.replace('_', ' ')}")
        names = [f"task {j + 1}" for j in range(len(self.matrix))]
        for column in (*names, "average", "forgetting"):
            found.add_column(column, justify="right")
        measures = self.measures
        for i, row in enumerate(self.matrix):
            lost = measures.forgettings[i]
            scores = [decimals(score) for score in row] + [""] * (len(names) - len(row))
            found.add_row(
                f"{i + 1}: {self.tasks[i]}",
                *scores,
                decimals(measures.averages[i]),
                "" if lost is None else decimals(lost),
            )
        return found

    def lines(self) -> list[tuple[str, str]]:
        """What follows from the matrix, in words."""
        measures, what = self.measures, self.metric.replace("_", " ")
        lost, gained = measures.forgettings[-1], measures.backward_transfer
        return [
            (f"average {what}", f"{decimals(measures.averages[-1])} after the last task"),
            (f"average anytime {what}", decimals(measures.average_anytime)),
            ("forgetting", "none can be measured" if lost is None else decimals(lost)),
            ("backward transfer", "none can be measured" if gained is None else decimals(gained)),
            *([("adapter", self.adapter)] if self.adapter else []),
        ]
