"""The picture of a run: loss and metrics over its steps, as PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAIN, VALIDATION, TEST, INK = "#4878a8", "#d1603d", "#2f2f2f", "#2f2f2f"


def plot_metrics(
    rows: list[dict[str, Any]], metric: str, title: str, folder: Path, best_step: int | None = None
) -> None:
    """Write metrics.png and metrics.svg: the loss, and the run's metric if that is another one.

    Args:
        rows: the lines of metrics.jsonl.
        metric: as the trainer logs it, without prefix.
        best_step: of the checkpoint that was kept, if it is not the last one; the scores after training are its.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    evaluated = any(key.endswith(f"_{metric}") for row in rows for key in row)
    panels = ["loss", metric] if metric != "loss" and evaluated else ["loss"]
    figure = Figure(figsize=(5.2 * len(panels), 3.6), layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", parse_math=False)  # names and paths may hold dollars
    for panel, name in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), panel)
        for key, label, colour, style in (
            (name, "train", TRAIN, "-"),
            (f"eval_{name}", "validation", VALIDATION, "o-"),
            (f"test_{name}", "test, before and after", TEST, "D:"),
        ):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if key.startswith("test_") and best_step is not None:
                points = [(min(step, best_step), value) for step, value in points]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=4, linewidth=1.4)
        if best_step is not None:
            axes.axvline(best_step, color=VALIDATION, linewidth=0.8, linestyle="--", alpha=0.6, label="kept")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    save_figure(figure, folder / "metrics")


def save_figure(figure: Figure, path: Path) -> None:
    """Writes `path`.png and `path`.svg."""
    for suffix in ("png", "svg"):
        figure.savefig(f"{path}.{suffix}", dpi=150)
