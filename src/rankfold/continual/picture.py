"""The picture of tasks in a row: the matrix of scores, and their average after each task."""

from __future__ import annotations

import math
from pathlib import Path

from rankfold.continual.result import ContinualResult
from rankfold.inspect.pictures import INK, heat
from rankfold.train.plot import TEST, TRAIN, VALIDATION


def draw(result: ContinualResult, folder: Path) -> None:
    """Writes continual.svg and continual.png."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    matrix, measures, n = result.matrix, result.measures, len(result.matrix)
    what = result.metric.replace("_", " ")
    figure = Figure(figsize=(2.2 + 0.55 * n + 4.6, max(3.4, 1.6 + 0.42 * n)), layout="constrained", facecolor="white")
    title = f"{result.method['name']} ({result.next_task}) on {result.model}, {n} tasks in a row"
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", color=INK, parse_math=False)
    left, right = figure.subplots(1, 2, width_ratios=[1.4 + 0.55 * n, 4.6])
    heat(left, [[*row, *[math.nan] * (n - len(row))] for row in matrix], "Blues", "{:.3g}")
    left.set_title(f"{result.measured_on} {what}", fontsize=10, color=INK, loc="left")
    left.set(xlabel="of task", ylabel="after task")
    for ticks in (left.set_xticks, left.set_yticks):
        ticks(range(n), [str(i + 1) for i in range(n)], fontsize=8)
    after = range(1, n + 1)
    for j in range(n):
        steps = list(after)[j:]
        label = "each task" if j == 0 else None
        right.plot(
            steps,
            [matrix[i - 1][j] for i in steps],
            "o-",
            color=TRAIN,
            alpha=0.3,
            linewidth=1,
            markersize=3,
            label=label,
        )
    right.plot(
        after, measures.averages, "o-", color=TEST, linewidth=1.8, markersize=4, label="average of the tasks seen"
    )
    right.axhline(measures.average_anytime, color=VALIDATION, linewidth=1, linestyle="--", label="average anytime")
    right.set_title(what, fontsize=10, color=INK, loc="left")
    right.set_xlabel("after task")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.grid(alpha=0.25)
    right.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=8)
    with rc_context({"svg.hashsalt": "rankfold", "svg.fonttype": "none"}):  # the same bytes from the same matrix
        figure.savefig(folder / "continual.svg", metadata={"Date": None})
    figure.savefig(folder / "continual.png", dpi=150, metadata={"Software": None})
