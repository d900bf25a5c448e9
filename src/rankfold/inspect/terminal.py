"""Inspections for a terminal: tables whose cells are shaded by their value, and bars for spectra and histories."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rankfold.inspect.grid import Grid
from rankfold.inspect.inspection import Inspection, ModuleUpdate, RankHistory
from rankfold.text import short_number, table

BARS = "▁▂▃▄▅▆▇█"
#: From the least to the largest value; a cell sets its own background, so light and dark terminals show the same.
LIGHT, DARK = (238, 243, 248), (31, 78, 121)


def show_adapter(found: Inspection, width: int = 80) -> Group:
    """Heat tables of rank with norm and of the spectrum, and a summary by kind of module."""
    updates = {u.module: u for u in found.updates}
    most = max(u.norm for u in found.updates)

    def rank_and_norm(name: str) -> Text:
        u = updates[name]
        return _cell(
            f"{u.rank} {short_number(u.norm):>5}" if u.norm else f"{u.rank}     –", u.norm / most if most else 0.0
        )

    def spectrum(name: str) -> Text:
        u = updates[name]
        share = u.effective_rank / max(u.start, 1)
        return _cell(f"{bars(u.sigma, 5):<5} {u.effective_rank:>4.1f}" if u.sigma else "–", share)

    dead = sum(u.rank == 0 for u in found.updates)
    summary = (
        f"{found.method}: {found.rank:,} of {found.start:,} ranks kept in {len(found.updates)} matrices"
        + (f", {dead} without any" if dead else "")
        + f"; {found.parameters:,} parameters as a plain LoRA, norm of all updates {short_number(found.norm)}"
    )
    return Group(
        *_heat_tables(found.grid, f"{found.name}: rank kept, and norm of the update (shade)", rank_and_norm, width),
        *_heat_tables(found.grid, "spectrum from the largest singular value on, and effective rank", spectrum, width),
        _title("by kind: rank least–most, medians of the others"),
        _by_kind(found),
        Text(summary),
        *_links(found, width),
        *(Text(f"not shown: {what}") for what in found.left_out),
    )


def _links(found: Inspection, width: int) -> Iterator[Text]:
    if found.links:
        first, last = found.links[0], found.links[-1]
        yield Text(
            f"{len(found.links)} finished links, of rank {sum(link.rank for link in found.links):,} together, tied after steps "
            f"{first.step:,} to {last.step:,}; norm of each from {short_number(first.norm)} to {short_number(last.norm)}:"
        )
        yield Text(bars([link.norm for link in found.links], width - 2))


def _by_kind(found: Inspection) -> Table:
    kinds = table(gap=1)
    kinds.add_column("", no_wrap=True)
    for name in ("rank", "norm", "effective", "stable", "99 % energy"):
        kinds.add_column(name, justify="right", no_wrap=True)
    for column, kind in enumerate(found.grid.columns):
        members = [u for u in found.updates if found.grid.cells[u.module][1] == column]
        ranks = [u.rank for u in members]

        def median(read: Callable[[ModuleUpdate], float], members: Sequence[ModuleUpdate] = members) -> str:
            return short_number(statistics.median(read(u) for u in members))

        kinds.add_row(
            kind,
            f"{min(ranks)}–{max(ranks)}" if len(set(ranks)) > 1 else str(ranks[0]),
            median(lambda u: u.norm),
            median(lambda u: u.effective_rank),
            median(lambda u: u.stable_rank),
            median(lambda u: u.energy_rank),
        )
    return kinds


def show_history(found: RankHistory, width: int = 80) -> Group:
    """A line over the steps for each kind of module, and the last ranks as a heat table."""
    lines = table(gap=1)
    lines.add_column("", no_wrap=True)
    lines.add_column("first", justify="right")
    lines.add_column("over the steps", no_wrap=True)
    lines.add_column("last", justify="right")
    for name, ranks in [*found.by_kind().items(), ("all", found.total)]:
        lines.add_row(name, f"{ranks[0]:,}", bars(ranks, min(40, width - 40)), f"{ranks[-1]:,}")
    most = max(max(ranks) for ranks in found.ranks.values()) or 1

    def last(name: str) -> Text:
        rank = found.ranks[name][-1]
        return _cell(f"{rank:>4}", rank / most)

    title = _title(f"{found.name}: rank over steps {found.steps[0]:,} to {found.steps[-1]:,}")
    return Group(title, lines, *_heat_tables(found.grid, f"rank at step {found.steps[-1]:,}", last, width))


def bars(values: Sequence[float], width: int) -> str:
    """Values as bars from 0 to the largest, the means of neighbours where there are more than `width`, or than one."""
    width = max(width, 1)  # what a terminal of 40 columns leaves
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        values = [statistics.fmean(values[a:b]) for a, b in pairwise(edges)]
    most = max(values, default=0.0)
    if most <= 0:
        return " " * len(values)
    return "".join(" " if v <= 0 else BARS[min(int(8 * v / most), 7)] for v in values)


def _heat_tables(grid: Grid, title: str, cell: Callable[[str], Text], width: int) -> Iterator[Text | Table]:
    """As many tables side by side, one below the other, as the width makes necessary."""
    label = max(len(row) for row in grid.rows) + 1
    names = {place: name for name, place in grid.cells.items()}
    cells = {place: cell(name) for place, name in names.items()}
    widths = []
    for column, kind in enumerate(grid.columns):
        inside = max(t.cell_len for (_, c), t in cells.items() if c == column)
        widths.append(max(inside, *(len(part) for part in _lines(kind))) + 1)
    for columns in _parts(widths, width - label):
        part = table(gap=1)
        part.add_column("")
        for column in columns:
            part.add_column("\n".join(_lines(grid.columns[column])), justify="right", no_wrap=True, vertical="bottom")
        for row, name in enumerate(grid.rows):
            part.add_row(name, *(cells.get((row, column), Text("")) for column in columns))
        yield from (_title(title), part)
        title = "(continued)"


def _parts(widths: Sequence[int], room: int) -> Iterator[list[int]]:
    part: list[int] = []
    for column, width in enumerate(widths):
        if part and sum(widths[c] for c in part) + width > room:
            yield part
            part = []
        part.append(column)
    yield part


def _lines(kind: str) -> list[str]:
    """A long name over several lines of a heading."""
    return re.sub(r"\.|(?<=[a-z])(?=[A-Z])", lambda m: f"{m[0]}\n", kind).split("\n")


def _cell(text: str, share: float) -> Text:
    share = min(max(share, 0.0), 1.0)
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(LIGHT, DARK, strict=True))
    ink = "white" if share > 0.5 else "black"
    return Text(text, style=f"{ink} on rgb({red},{green},{blue})")


def _title(text: str) -> Text:
    """Not the table's own title, which a narrow table would wrap."""
    return Text(text, style="bold")
