"""The pictures of a comparison. Each is as wide as a phone, so that its text is never scaled below its size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from rankfold.compare import wording as say
from rankfold.compare.analysis import Analysis, Contender
from rankfold.compare.report.svg import FONT, INK, LINE, MUTED, WIDTH, colour, inline, marker, new_figure, size
from rankfold.compare.trial_file import TrialLine
from rankfold.inspect.grid import grid

#: As many letters as fit in a row: a name, a gap and its number.
LETTERS = 36


@dataclass(frozen=True)
class Picture:
    """An inline SVG, what stands below it, and its width in CSS pixels."""

    svg: str
    caption: str
    width: int = WIDTH


def results(analysis: Analysis) -> Picture:
    """One row per contender, the best first: its mean, its interval, and each seed."""
    ranked = analysis.ranked
    n = say.digits(analysis)
    indices = _indices(analysis)
    figure, axes = _rows(len(ranked), [(c.name, say.number(c.test, n)) for c in ranked])
    for row, c in enumerate(ranked):
        shade = colour(indices[c.name])
        if c.interval:
            axes.plot(c.interval, (row, row), color=shade, linewidth=3, solid_capstyle="butt", zorder=2)
        below = [row + 0.2] * len(c.tests)
        axes.plot(c.tests, below, "|", color=INK, markersize=7, markeredgewidth=1.2, zorder=4)
        axes.plot([c.test], [row], marker(indices[c.name]), color=shade, markersize=size(indices[c.name]), zorder=3)
    reference = next((c for c in ranked if c.name == analysis.reference), None)
    if reference and len(ranked) > 1:
        axes.axvline(reference.test, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xlim(*_limits([t for c in ranked for t in c.tests], [c.interval for c in ranked]))
    _inner_ticks(axes)
    bar = ", 95 % interval of each contender alone (bar)" if analysis.over != "nothing" else ""
    caption = f"Mean (marker){bar} and each seed (strokes below)."
    if reference and len(ranked) > 1:
        caption += f" The dashed line is {reference.name}."
    told = "; ".join(f"{c.name} {say.number(c.test, n)} ({say.between(c.interval, n)})" for c in ranked)
    return Picture(inline(figure, "results", f"Test {say.words(analysis.metric)} of each contender", told), caption)


def parameters(analysis: Analysis, cost: str) -> Picture | None:
    """The metric over parameters, trained or kept, with the Pareto front."""
    known = [c for c in analysis.contenders if getattr(c, cost) is not None]
    if len(known) < 2:
        return None
    indices, n = _indices(analysis), say.digits(analysis)
    figure = new_figure(340)
    axes = _axes(figure, say.words(analysis.metric))
    wide = [float(getattr(c, cost)) for c in known]
    logarithmic = max(wide) > 5 * max(min(wide), 1) and min(wide) > 0
    scaled: list[float] = [math.log10(x) for x in wide] if logarithmic else wide
    low, high = min(scaled), max(scaled)
    # At least a tenth of the count to either side, lest a few parameters look like a difference
    margin: float = max(0.14 * (high - low), 0.0 if logarithmic else 0.1 * high) or 1.0
    low, high = low - margin, high + margin
    at = _apart(scaled, 0.055 * (high - low))
    # Those at the ends of a row that was spread out
    low, high = min(low, min(at) - 0.05 * (high - low)), max(high, max(at) + 0.05 * (high - low))
    across = [10**x if logarithmic else x for x in at]
    if logarithmic:
        axes.set_xscale("log")
        low, high = 10**low, 10**high
    on = {c.name: bool(getattr(c, f"front_{cost}")) for c in known}
    line = sorted((x, c.test) for x, c in zip(across, known, strict=True) if on[c.name])
    if len(line) > 1:
        axes.plot(*zip(*line, strict=True), color=MUTED, linewidth=1.3, linestyle=(0, (5, 3)), zorder=1)
    for x, c in zip(across, known, strict=True):
        shade = colour(indices[c.name])
        if c.interval:
            axes.plot((x, x), c.interval, color=shade, linewidth=2, zorder=2)
        if on[c.name]:
            axes.plot([x], [c.test], "o", markersize=20, markerfacecolor="none", markeredgecolor=MUTED, zorder=2)
        axes.plot([x], [c.test], marker(indices[c.name]), color=shade, markersize=size(indices[c.name]), zorder=3)
    axes.set_xlim(low, high)
    axes.set_ylim(*_limits([c.test for c in known], [c.interval for c in known]))
    _count_ticks(axes, logarithmic, low, high)
    title = "trained parameters" if cost == "trained" else "parameters kept after training, as a plain LoRA"
    axes.set_xlabel(title if cost == "trained" else "parameters kept", fontsize=FONT, color=INK)
    front = say.names([c.name for c in known if on[c.name]], most=99)
    caption = f"{say.words(analysis.metric).capitalize()} over {title}. On the Pareto front (ringed): {front}."
    if at != scaled:
        caption += " Those with nearly equal counts are drawn side by side."
    told = "; ".join(f"{c.name}: {say.count(getattr(c, cost))}, {say.number(c.test, n)}" for c in known)
    return Picture(inline(figure, f"parameters-{cost}", f"{analysis.metric} over {title}", told), caption)


def curves(analysis: Analysis, trials: dict[str, list[TrialLine]], kind: str) -> Picture | None:
    """Training loss or validation metric over the steps at the chosen rate, mean over seeds."""
    from matplotlib.ticker import MaxNLocator

    indices = _indices(analysis)
    figure = new_figure(320)
    what = "training loss" if kind == "loss" else f"validation {say.words(analysis.metric)}"
    axes = _axes(figure, what)
    drawn: dict[str, list[tuple[float, float]]] = {}
    for c in analysis.contenders:
        points = _mean_curve([t.curve.get(kind) or [] for t in trials[c.name]])
        if points:
            drawn[c.name] = points
            every = max(1, len(points) // 5)
            style = {
                "marker": marker(indices[c.name]),
                "markersize": size(indices[c.name], 7),
                "markevery": (indices[c.name] % every, every),
            }
            axes.plot(*zip(*points, strict=True), color=colour(indices[c.name]), linewidth=1.6, **style)
    if not drawn:
        return None
    axes.set_xlabel("optimiser step", fontsize=FONT, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    told = "; ".join(f"{name}: from {points[0][1]:.4g} to {points[-1][1]:.4g}" for name, points in drawn.items())
    caption = f"{what.capitalize()} at each contender's chosen rate, mean over its seeds."
    return Picture(inline(figure, f"curve-{kind}", f"{what} over the steps", told), caption)


def rates(analysis: Analysis) -> Picture:
    """The validation metric over the learning rate."""
    from matplotlib.ticker import FixedLocator, NullLocator

    indices = _indices(analysis)
    figure = new_figure(340)
    axes = _axes(figure, f"validation {say.words(analysis.metric)}")
    tried = sorted({p.rate for c in analysis.contenders for p in c.sensitivity.points})
    told, nothing, halved = [], False, False
    for c in analysis.contenders:
        shade, index, s = colour(indices[c.name]), indices[c.name], c.sensitivity
        first = [(p.rate, p.first) for p in s.points if p.first is not None]
        ended = [(p.rate, p.mean) for p in s.points if p.mean is not None and p.rung is None]
        if first:
            halved = True
            axes.plot(*zip(*first, strict=True), marker=marker(index), color=shade, linewidth=1.2, zorder=2,
                      markersize=size(index, 5), markerfacecolor="none", linestyle=(0, (4, 2)))  # fmt: skip
        else:
            axes.plot(*zip(*ended, strict=True), color=shade, linewidth=1.6, zorder=2)
        for rate, mean in ended:
            axes.plot([rate], [mean], marker(index), markerfacecolor=shade if rate == s.best else "none", zorder=3,
                      markeredgecolor=shade, markersize=size(index, 9), markeredgewidth=1.8)  # fmt: skip
        for p in s.points:
            if p.mean is None:
                nothing = True
                share = (index + 0.5) / len(analysis.contenders)  # beside each other, not on one spot
                across = p.rate * 10 ** (0.12 * (share - 0.5))
                axes.plot([across], [0.02], "x", color=shade, markersize=9, markeredgewidth=2.2, clip_on=False,
                          transform=axes.get_xaxis_transform())  # fmt: skip
        shown = ", ".join(f"{p.rate:g}: {'no result' if p.mean is None else say.number(p.mean)}" for p in s.points)
        told.append(f"{c.name}: {shown}; best {s.best:g}")
    axes.set_xscale("log")
    span = math.log10(max(tried) / min(tried)) or 0.6
    axes.set_xlim(min(tried) / 10 ** (0.1 * span), max(tried) * 10 ** (0.1 * span))
    # Ticks at rates that were tried, as many as have room
    ticks = tried[:1]
    for rate in tried[1:]:
        if math.log10(rate / ticks[-1]) > 0.19 * span:
            ticks.append(rate)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([_rate(r) for r in ticks])
    axes.set_xlabel("learning rate", fontsize=FONT, color=INK)
    caption = "Validation metric over the learning rate, mean over the seeds tried with every rate. The chosen rate is filled."
    if halved:
        caption += " Dashed: at the first rung of halving, to which all rates were trained."
    if nothing:
        caption += " Crosses below: no seed finished."
    return Picture(inline(figure, "rates", "validation metric over the learning rate", "; ".join(told)), caption)


def bars(
    analysis: Analysis, name: str, title: str, read: Callable[[Contender], float | None], show: Callable[[float], str]
) -> Picture | None:
    """One bar per contender, from 0, in the order of the file."""
    known = [(c, value) for c in analysis.contenders if (value := read(c)) is not None]
    if not known:
        return None
    indices = _indices(analysis)
    figure, axes = _rows(len(known), [(c.name, show(value)) for c, value in known], ticks=False)
    for row, (c, value) in enumerate(known):
        axes.barh([row], [value], height=0.26, color=colour(indices[c.name]), zorder=2)
    axes.set_xlim(0, max(value for _, value in known) * 1.02 or 1)
    told = "; ".join(f"{c.name}: {show(value)}" for c, value in known)
    return Picture(inline(figure, name, title, told), title)


def ranks(contender: Contender, trials: Sequence[TrialLine], index: int) -> Picture:
    """The ranks that training left: one row per layer, one column per kind of module, mean over seeds."""
    from matplotlib.patches import Rectangle

    found = {module: fmean(t.ranks[module] for t in trials if module in t.ranks) for module in trials[0].ranks}
    layout = grid(found)
    rows, columns = len(layout.rows), len(layout.columns)
    longest = max(len(c) for c in layout.columns)
    label = 9 * max(len(r) for r in layout.rows) + 14
    width = max(WIDTH, label + 46 * columns)
    head = 8.6 * longest + 16
    height = head + 24 * rows + 4
    figure = new_figure(height, width)
    figure.set_layout_engine("none")
    axes = figure.add_axes((label / width, 4 / height, 1 - label / width, 24 * rows / height))
    most = max(found.values()) or 1
    n = 0 if all(value == round(value) for value in found.values()) else 1
    for module, value in found.items():
        row, column = layout.cells[module]
        share = 0.04 + 0.5 * value / most
        axes.add_patch(Rectangle((column, row), 0.96, 0.92, facecolor=colour(index), alpha=share, linewidth=0))
        text = f"{value:.{n}f}"
        axes.text(column + 0.48, row + 0.48, text, ha="center", va="center", fontsize=FONT, color=INK)
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    axes.set_yticks([r + 0.46 for r in range(rows)], layout.rows, fontsize=FONT, color=INK)
    axes.xaxis.tick_top()
    axes.set_xticks([c + 0.48 for c in range(columns)], layout.columns, fontsize=FONT, color=INK, rotation=90)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_facecolor("none")
    least, total = min(found.values()), sum(found.values())
    seeds = f"mean of {len(trials)} seeds" if len(trials) > 1 else "one seed"
    caption = f"{contender.name}: rank by layer (rows) and kind of module, {seeds}; {least:.{n}f} to {most:.{n}f}, {total:,.0f} in all."
    told = "; ".join(f"{module} {value:.3g}" for module, value in found.items())
    return Picture(inline(figure, f"ranks-{index}", f"ranks that {contender.name} chose", told), caption, round(width))


# --- parts --------------------------------------------------------------------------------------------------------------


def _indices(analysis: Analysis) -> dict[str, int]:
    """Which colour and marker a contender has in every picture."""
    return {c.name: i for i, c in enumerate(analysis.contenders)}


def _axes(figure: Any, title: str) -> Any:
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.set_title(title, fontsize=FONT, color=INK, loc="left", pad=8)
    axes.grid(color=LINE, linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(which="both", labelsize=FONT, colors=MUTED, labelcolor=INK)
    return axes


def _rows(count: int, labels: Sequence[tuple[str, str]], ticks: bool = True) -> tuple[Any, Any]:
    """Axes with one row per contender: above its mark, the name on the left and the value on the right."""
    from matplotlib.ticker import MaxNLocator

    height = 48 * count + (30 if ticks else 4)
    figure = new_figure(height)
    figure.set_layout_engine("none")
    left = 8 / WIDTH
    axes = figure.add_axes((left, 1 - 48 * count / height, 1 - 2 * left, 48 * count / height))
    axes.set_facecolor("none")
    for row, (name, number) in enumerate(labels):
        room = LETTERS - 2 - len(number)
        short = name if len(name) <= room else name[: room - 1].rstrip() + "…"
        for x, text, side in ((0.0, short, "left"), (1.0, number, "right")):
            axes.text(x, row - 0.4, text, ha=side, va="center", fontsize=FONT, color=INK, parse_math=False,
                      transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_ylim(count - 0.6, -0.72)
    axes.set_yticks([])
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.spines["bottom"].set_visible(ticks)
    axes.tick_params(which="both", labelsize=FONT, colors=MUTED, labelcolor=INK)
    if ticks:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="x", color=LINE, linewidth=1)
        axes.set_axisbelow(True)
    else:
        axes.set_xticks([])
    return figure, axes


def _limits(points: Sequence[float], intervals: Sequence[tuple[float, float] | None]) -> tuple[float, float]:
    """Room for the points and the usual interval; a far longer one may leave the picture (three seeds can make it so)."""
    known = [i for i in intervals if i is not None]
    low, high = min(points), max(points)
    reach = 1.5 * max(high - low, median(b - a for a, b in known) if known else 0.0)
    ends = [x for i in known for x in i]
    low, high = max(min([low, *ends]), low - reach), min(max([high, *ends]), high + reach)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _apart(values: Sequence[float], least: float) -> list[float]:
    """The values, those nearer to each other than `least` spread out evenly about where they stand."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    groups: list[list[int]] = []
    middles: list[float] = []
    for i in order:
        groups.append([i])
        middles.append(values[i])

        def left(g: int) -> float:
            return middles[g] - (len(groups[g]) - 1) / 2 * least

        # A group that reaches into the one before it joins it; their middle is where they stand
        while len(groups) > 1 and left(-1) - (left(-2) + (len(groups[-2]) - 1) * least) < least - 1e-12:
            groups[-2:] = [groups[-2] + groups[-1]]
            middles[-2:] = [fmean(values[k] for k in groups[-1])]
    moved = list(values)
    for group, middle in zip(groups, middles, strict=True):
        for k, i in enumerate(group):
            if len(group) > 1:
                moved[i] = middle + (k - (len(group) - 1) / 2) * least
    return moved


def _inner_ticks(axes: Any) -> None:
    """No tick so near an end that its label would leave the picture."""
    low, high = axes.get_xlim()
    margin = 0.06 * (high - low)
    axes.set_xticks([t for t in axes.get_xticks() if low + margin <= t <= high - margin])


def _mean_curve(found: Sequence[Sequence[Sequence[float]]]) -> list[tuple[float, float]]:
    """At the steps that every seed measured; a seed that stopped early ends the mean."""
    tables = [{step: value for step, value in points if value is not None} for points in found if points]
    if not tables:
        return []
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    return [(step, fmean(table[step] for table in tables)) for step in steps]


def _count_ticks(axes: Any, logarithmic: bool, low: float, high: float) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    axes.xaxis.set_major_locator(MaxNLocator(4))
    if logarithmic:
        first, last = math.log10(low), math.log10(high)
        even = [10 ** (first + (last - first) * share) for share in (0.1, 0.37, 0.63, 0.9)]
        axes.xaxis.set_major_locator(FixedLocator([float(f"{x:.1g}") for x in even]))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: say.short(x)))


def _rate(rate: float) -> str:
    return f"{rate:g}" if 0.001 <= rate < 1 else f"{rate:.0e}".replace("e-0", "e-")
