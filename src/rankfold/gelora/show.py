"""Shows a GeLoRA plan: a table for the terminal, and a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rankfold.gelora.ranks import BlockRank, GeloraPlan
from rankfold.inspect.pictures import INK, check_picture

DIMENSION, RANK = "#4878a8", "#d1603d"


def table(plan: GeloraPlan) -> Group:
    """One row per block, 80 columns wide, and below it what was measured."""
    t = Table(box=None, pad_edge=False, header_style="bold")
    t.add_column("block", no_wrap=True)
    for name in ("d in", "d out", "rise", "rank", "by chance", "parameters"):
        t.add_column(name, justify="right", no_wrap=True)
    most = max(block.rank for block in plan.blocks)
    bar = min(most, 8)
    for block in plan.blocks:
        t.add_row(
            block.name,
            f"{block.d_in:.1f} ±{block.sd_in:.1f}",
            f"{block.d_out:.1f} ±{block.sd_out:.1f}",
            f"{block.d_out - block.d_in:+.1f}",
            Text.assemble((f"{block.rank} ", "bold"), (f"{'█' * math.ceil(block.rank * bar / most):<{bar}}", RANK)),
            str(block.low) if block.low == block.high else f"{block.low}–{block.high}",
            f"{block.parameters:,}",
        )
    return Group(
        Text(f"GeLoRA on {_short(plan.model)}", style="bold"), t, *(Text(fact, style="dim") for fact in _facts(plan))
    )


def _facts(plan: GeloraPlan) -> list[str]:
    d = plan.dimensions
    matrices = plan.module_ranks()
    return [
        f"{plan.parameters:,} parameters in {len(matrices)} matrices, mean rank "
        f"{sum(matrices.values()) / len(matrices):.2f}, alpha = 32 x rank",
        f"d: mean ± standard deviation over {d.subsamples} random halves of {d.points:,} points",
        "by chance: least and largest rank that single halves give",
        f"measured in {sum(d.seconds.values()):.1f} s: states {d.seconds['states']:.1f} s, "
        f"dimensions {d.seconds['dimensions']:.1f} s",
        *plan.notes,
    ]


def picture(plan: GeloraPlan, path: Path) -> None:
    """Above, the dimension of the state between blocks, with its spread; below, the rank of each block. One column per stack; SVG, PNG or PDF by the file's extension.

    Raises:
        ValueError: unsupported file extension.
    """
    check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chains = plan.dimensions.chains
    widths = [max(3.4, 0.27 * len(chain.samples)) for chain in chains]
    figure = Figure(figsize=(max(sum(widths) + 1.2, 6.2), 4.8), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(f"GeLoRA on {_short(plan.model)}", fontsize=12, x=0.01, ha="left", color=INK, parse_math=False)
    grid = figure.subplots(2, len(chains), squeeze=False, width_ratios=widths, height_ratios=[3, 2], sharey="row")
    for column, chain in enumerate(chains):
        blocks = [b for b in plan.blocks if b.name.rpartition(".")[0] == chain.stack]
        _draw_dimensions(grid[0][column], chain.d, chain.spread)
        _draw_ranks(grid[1][column], blocks)
        for axes in (grid[0][column], grid[1][column]):
            axes.set_xlim(-0.8, len(blocks) - 0.2)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=9, colors=INK)
        grid[0][column].set_title(chain.stack, fontsize=10, color=INK, loc="left")
        grid[0][column].tick_params(labelbottom=False)
        step = 1 if len(blocks) <= 16 else 2 if len(blocks) <= 40 else 5
        for axes in (grid[0][column], grid[1][column]):
            axes.set_xticks(range(0, len(blocks), step))
        grid[1][column].set_xlabel("block", fontsize=10)
    grid[1][0].set_ylim(0, max(max(b.high, b.rank) for b in plan.blocks) + 0.4)
    grid[1][0].yaxis.get_major_locator().set_params(integer=True)
    keys = {label: key for axes in grid.flat for key, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(keys.values()),
        list(keys),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=8,
        columnspacing=1.4,
    )
    grid[0][0].set_ylabel("intrinsic dimension", fontsize=10, color=INK)
    grid[1][0].set_ylabel("rank", fontsize=10, color=INK)
    figure.savefig(path, dpi=150)


def _draw_dimensions(axes: Any, d: list[float], spread: list[float]) -> None:
    """State i lies between blocks i − 1 and i, at x = i − ½, so that a rise stands above its block."""
    x = [i - 0.5 for i in range(len(d))]
    low, high = ([v + sign * s for v, s in zip(d, spread, strict=True)] for sign in (-1, 1))
    axes.plot(x, d, "o-", color=DIMENSION, markersize=4, linewidth=1.6, label="between blocks")
    axes.fill_between(x, low, high, color=DIMENSION, alpha=0.2, linewidth=0, label="± sd over subsamples")
    axes.margins(y=0.12)
    axes.grid(alpha=0.25)


def _draw_ranks(axes: Any, blocks: list[BlockRank]) -> None:
    ranks = [b.rank for b in blocks]
    x = range(len(blocks))
    axes.bar(x, ranks, width=0.7, color=RANK, label="rank")
    unsure = [(at, b.rank, b.rank - min(b.low, b.rank), max(b.high, b.rank) - b.rank) for at, b in enumerate(blocks)]
    unsure = [row for row in unsure if any(row[2:])]
    if unsure:
        at, rank, down, up = zip(*unsure, strict=True)
        axes.errorbar(
            at, rank, (down, up), fmt="none", ecolor=INK, elinewidth=1, capsize=2.5, label="range of single subsamples"
        )
    for b, at in zip(blocks, x, strict=True):
        axes.annotate(
            str(b.rank),
            (at, 0),
            (0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color="white",
            weight="bold",
        )
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def _short(model: str) -> str:
    """The last parts of a path, or the id as it is."""
    return "/".join(Path(model).parts[-2:]) if Path(model).is_absolute() else model
