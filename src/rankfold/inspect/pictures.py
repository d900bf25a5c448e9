"""Inspections as pictures: heat maps of layers × kinds, spectra, and ranks over steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import accumulate, pairwise, zip_longest
from pathlib import Path
from typing import Any

from rankfold.errors import RankfoldError
from rankfold.inspect.inspection import Inspection, RankHistory

INK, NOTHING = "#2f2f2f", "#ececec"
PICTURES = (".svg", ".png", ".pdf")
#: Singular values below this share of the largest are rounding.
FLOOR = 1e-6


def check_picture(path: Path) -> None:
    """Raises ValueError unless the file's ending is one that is drawn."""
    if path.suffix.lower() not in PICTURES:
        raise RankfoldError(f"picture: '{path}' must end in {', '.join(PICTURES)}")


def draw_adapter(found: Inspection, path: Path) -> None:
    """Draws rank, norm and effective rank by layer and kind, and the spectra; SVG, PNG or PDF by the file's ending."""
    check_picture(path)
    rows, columns = len(found.grid.rows), len(found.grid.columns)
    map_width, height = 0.9 + 0.46 * columns, max(4.0, 1.5 + 0.215 * rows)
    spectrum_width = 5.4  # with its legend
    title = f"{found.name}: {found.method}, {found.rank:,} of {found.start:,} ranks kept"
    figure = _figure((3 * map_width + spectrum_width, height), title)
    grid = figure.add_gridspec(1, 4, width_ratios=[map_width] * 3 + [spectrum_width])
    maps = (
        ("rank kept", {u.module: float(u.rank) for u in found.updates}, "Blues", "{:.0f}"),
        ("norm of the update", {u.module: u.norm for u in found.updates}, "Oranges", "{:.2g}"),
        ("effective rank", {u.module: u.effective_rank for u in found.updates}, "Greens", "{:.1f}"),
    )
    first: Any = None
    for i, (name, values, colours, form) in enumerate(maps):
        axes = figure.add_subplot(grid[0, i], sharey=first)
        first = first or axes
        table = found.grid.table(values, math.nan)
        heat(axes, table, colours, form)
        axes.set_title(name, fontsize=10, color=INK, loc="left")
        axes.set_xticks(range(columns), [c.replace(".", ".\n") for c in found.grid.columns], rotation=90, fontsize=8)
        _layer_ticks(axes, found.grid.rows)
        axes.tick_params(labelleft=i == 0)
    first.set_ylabel("layer", fontsize=10, color=INK)
    _spectra(figure.add_subplot(grid[0, 3]), found)
    figure.savefig(path, dpi=140)


def _spectra(axes: Any, found: Inspection) -> None:
    """Singular values of every matrix as thin lines, the median of each kind as a thick one."""
    from matplotlib import colormaps

    colours = colormaps["tab10" if len(found.grid.columns) <= 10 else "tab20"].colors  # pyright: ignore
    largest = max((u.sigma[0] for u in found.updates if u.sigma), default=0.0)
    axes.set_title("spectra: median of each kind, each matrix thin", fontsize=10, color=INK, loc="left")
    axes.set_xlabel("singular value", fontsize=9, color=INK)
    _plain(axes)
    if largest == 0:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "every update is zero", ha="center", va="center", transform=axes.transAxes, color=INK)
        return
    for column, kind in enumerate(found.grid.columns):
        colour = colours[column % len(colours)]
        spectra = [u.sigma for u in found.updates if found.grid.cells[u.module][1] == column]
        spectra = [[s for s in sigma if s >= FLOOR * largest] for sigma in spectra]
        for sigma in spectra:
            axes.plot(range(1, len(sigma) + 1), sigma, color=colour, alpha=0.18, linewidth=0.7)
        # Where matrices of one kind kept different ranks, what a matrix has not counts as zero
        medians = [statistics.median(row) for row in zip_longest(*spectra, fillvalue=0.0)]
        medians = [m for m in medians if m > 0]
        axes.plot(
            range(1, len(medians) + 1), medians, "o-", color=colour, label=kind, linewidth=1.7, markersize=3, zorder=3
        )
    axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def draw_history(found: RankHistory, path: Path) -> None:
    """Draws the total over the steps, and below it a map of layers over steps for each kind of module."""
    check_picture(path)
    kinds, rows = found.grid.columns, found.grid.rows
    across = min(4, len(kinds))
    down = math.ceil(len(kinds) / across)
    row_height = max(1.5, 0.55 + 0.1 * len(rows))
    figure = _figure((max(6.4, 2.9 * across + 0.8), 2.3 + row_height * down), f"{found.name}: rank over training steps")
    grid = figure.add_gridspec(1 + down, across, height_ratios=[1.9] + [row_height] * down)
    axes = figure.add_subplot(grid[0, :])
    points = len(found.steps)
    axes.plot(found.steps, found.total, "o-" if points < 30 else "-", color="#4878a8", linewidth=1.8, markersize=4)
    axes.set_ylabel("total rank", fontsize=9, color=INK)
    axes.set_ylim(0, max(found.total) * 1.08 or 1)
    axes.set_title(
        f"{found.total[0]:,} at step {found.steps[0]:,}, {found.total[-1]:,} at step {found.steps[-1]:,}",
        fontsize=9,
        loc="right",
        color=INK,
    )
    axes.grid(alpha=0.25)
    _plain(axes)
    most = max(max(ranks) for ranks in found.ranks.values()) or 1
    maps, image = [], None
    for column, kind in enumerate(kinds):
        axes = figure.add_subplot(grid[1 + column // across, column % across])
        members = {
            found.grid.cells[n][0]: ranks for n, ranks in found.ranks.items() if found.grid.cells[n][1] == column
        }
        table = [members.get(row, (math.nan,) * len(found.steps)) for row in range(len(rows))]
        image = axes.pcolormesh(
            _edges(found.steps), range(len(rows) + 1), table, cmap=_colours("Blues"), vmin=0, vmax=most, rasterized=True
        )
        axes.set_facecolor(NOTHING)
        axes.invert_yaxis()
        axes.set_title(kind, fontsize=9, color=INK, loc="left")
        step = max(1, math.ceil(len(rows) / 10))
        labels = rows if column % across == 0 else [""] * len(rows)
        axes.set_yticks([r + 0.5 for r in range(0, len(rows), step)], labels[::step], fontsize=7.5)
        lowest = column + across >= len(kinds)
        axes.tick_params(axis="x", labelsize=7.5, labelbottom=lowest)
        axes.set_xlabel("step" if lowest else "", fontsize=8, color=INK)
        axes.xaxis.get_major_locator().set_params(nbins=4)
        maps.append(axes)
    bar = figure.colorbar(image, ax=maps, shrink=0.8, aspect=30, pad=0.01)
    bar.set_label("rank", fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    figure.savefig(path, dpi=140)


def draw_links(found: Inspection, path: Path) -> None:
    """Draws the norm of each finished link of a chain, and how their ranks add up, over the steps of their knots."""
    check_picture(path)
    steps, norms = [link.step for link in found.links], [link.norm for link in found.links]
    ranks = list(accumulate(link.rank for link in found.links))
    figure = _figure((6.4, 4.2), f"{found.name}: {found.method}, {len(steps)} finished links")
    above, below = figure.subplots(2, 1, sharex=True)
    starts = [0, *steps[:-1]]
    widths = [0.9 * (end - start) for start, end in zip(starts, steps, strict=True)]
    middles = [(start + end) / 2 for start, end in zip(starts, steps, strict=True)]
    above.bar(middles, norms, widths, color="#d98b4a")
    above.set_ylabel("norm of the link", fontsize=9, color=INK)
    below.step([0, *steps], [0, *ranks], where="post", color="#4878a8", linewidth=1.8)
    below.set_ylabel("summed rank", fontsize=9, color=INK)
    below.set_xlabel("step", fontsize=9, color=INK)
    for axes in (above, below):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        _plain(axes)
    figure.savefig(path, dpi=140)


def _edges(steps: Sequence[int]) -> list[float]:
    """The borders of the columns of a map whose centres are the steps."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    inner = [(a + b) / 2 for a, b in pairwise(steps)]
    return [steps[0] - (inner[0] - steps[0]), *inner, steps[-1] + (steps[-1] - inner[-1])]


def heat(axes: Any, table: list[list[float]], colours: str, form: str) -> None:
    """Draws a table as a map of colours, with its values in `form`; NaN is left empty."""
    known = [v for row in table for v in row if not math.isnan(v)]
    axes.set_facecolor(NOTHING)  # shows where there is no module
    axes.imshow(table, cmap=_colours(colours), vmin=0, vmax=max(known) or 1, aspect="auto")
    for r, row in enumerate(table):
        for c, value in enumerate(row):
            if not math.isnan(value):
                dark = value > 0.6 * (max(known) or 1)
                text = form.format(value).replace("e-0", "e-")
                axes.text(c, r, text, ha="center", va="center", fontsize=6.5, color="white" if dark else INK)
    axes.set_xticks([c - 0.5 for c in range(1, len(table[0]))], minor=True)
    axes.set_yticks([r - 0.5 for r in range(1, len(table))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def _colours(name: str) -> Any:
    """A colour map without its darkest part, in which labels would drown."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    shades = [colormaps[name](0.04 + 0.82 * i / 63) for i in range(64)]
    return LinearSegmentedColormap.from_list(name, shades)


def _layer_ticks(axes: Any, rows: Sequence[str]) -> None:
    axes.set_yticks(range(len(rows)), rows, fontsize=8)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", labelsize=8, colors=INK)


def _figure(size: tuple[float, float], title: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, x=0.008, ha="left", color=INK, parse_math=False)
    return figure
