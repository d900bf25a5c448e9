"""Puts the values and the answer of a comparison into words, the same for terminal and report."""

from __future__ import annotations

from collections.abc import Sequence

import rankfold.text
from rankfold.compare.analysis import Analysis, Contender, Difference
from rankfold.compare.selection import Sensitivity

MINUS, NOTHING = "−", "–"


def number(value: float | None, digits: int = 4) -> str:
    return NOTHING if value is None else f"{_rounded(value, digits):.{digits}f}".replace("-", MINUS)


def signed(value: float, digits: int = 4) -> str:
    return f"{_rounded(value, digits):+.{digits}f}".replace("-", MINUS)


def _rounded(value: float, digits: int) -> float:
    return round(value, digits) + 0.0  # which makes 0.0 of -0.0


def between(ends: tuple[float, float] | None, digits: int = 4, sign: bool = False) -> str:
    """An interval, as "0.8101 to 0.8312"."""
    if ends is None:
        return NOTHING
    show = signed if sign else number
    return f"{show(ends[0], digits)} to {show(ends[1], digits)}"


def count(value: float | None) -> str:
    """A number of parameters, as "337,920"."""
    return NOTHING if value is None else f"{value:,.0f}"


def at_a_time(c: Contender) -> str:
    """What is trained at a time, where links or boosters follow each other, as "at most 56,320 at a time"; else ""."""
    if c.live is None:
        return ""
    return "at a time" if c.live == c.trained else f"at most {count(c.live)} at a time"


def short(value: float) -> str:
    """A number of parameters for an axis, as "338k" or "1.2M"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def size(value: float | None) -> str:
    """Bytes, as "412 MB"."""
    if value is None:
        return NOTHING
    return rankfold.text.size(value)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    return rankfold.text.duration(seconds)


def words(metric: str) -> str:
    return metric.replace("_", " ")


def digits(analysis: Analysis) -> int:
    """Decimals that are worth showing: two more than the metric's size has before the point, four at most."""
    largest = max((abs(c.test) for c in analysis.contenders), default=0.0)
    return 4 if largest < 10 else 2


def names(some: Sequence[str], most: int = 4) -> str:
    """As "a, b and c", or "6 others" where they are many."""
    if len(some) > most:
        return f"{len(some)} others"
    some = [f"“{name}”" if "," in name else name for name in some]
    return some[0] if len(some) == 1 else f"{', '.join(some[:-1])} and {some[-1]}"


def answer(analysis: Analysis) -> str:
    """Two sentences: what came out best and how sure that is, and how it stands to the others."""
    if not analysis.contenders:
        return f"None of the {analysis.trials} trials finished, so there is no result. The failures below say why."
    best = analysis.ranked[0]
    return f"{_first(analysis, best)} {_second(analysis, best)}"


def _first(analysis: Analysis, best: Contender) -> str:
    n = digits(analysis)
    which = "highest" if analysis.greater_is_better else "lowest"
    seeds = f"mean of {len(best.seeds)} seeds" if len(best.seeds) > 1 else "one seed"
    if best.failed:
        seeds += f", while {len(best.failed)} more did not finish"
    sure = f"95 % interval {between(best.interval, n)}, " if best.interval and best.over != "rows" else ""
    rate = f"at learning rate {best.rate:g}"
    if len(analysis.contenders) == 1:
        return f"{best.name} reaches a test {words(analysis.metric)} of {number(best.test, n)} ({sure}{seeds}) {rate}."
    tied = [c.name for c in analysis.ranked if number(c.test, n) == number(best.test, n)]
    if len(tied) > 1:
        shared = f"{names(tied, len(tied))} have the {which} test {words(analysis.metric)}, {number(best.test, n)} each"
        return f"{shared}; {best.name} ({sure}{seeds}) {rate}."
    return f"{best.name} has the {which} test {words(analysis.metric)}: {number(best.test, n)} ({sure}{seeds}), {rate}."


def _second(analysis: Analysis, best: Contender) -> str:
    others = [c.name for c in analysis.ranked if c.name != best.name]
    if not others:
        return "It is the only contender with a finished trial, so there is nothing to hold it against."
    found = {name: analysis.difference(best.name, name) for name in others}
    beaten = [name for name in others if (d := found[name]) and d.verdict == "better"]
    open_ = [name for name in others if (d := found[name]) and d.verdict == "no difference shown"]
    untested = [name for name in others if name not in beaten and name not in open_]
    if len(untested) == len(others):
        return _untold(analysis, others, [len(d.seeds) for d in found.values() if d])
    parts = []
    reference = analysis.reference
    if reference in found and found[reference] is not None and reference not in untested and len(others) > 1:
        held = found[reference]
        assert held is not None
        parts.append(f"against {reference} {_held(analysis, held)}")
        beaten, open_ = ([n for n in some if n != reference] for some in (beaten, open_))
    elif len(others) == 1:
        held = found[others[0]]
        assert held is not None
        return _capital(f"against {others[0]} {_held(analysis, held)}.")
    rest = "the other contenders" if parts else "all others"
    if beaten and not open_ and not untested:
        parts.append(f"it is better than {names(beaten) if len(beaten) <= 4 else rest}")
    else:
        if beaten:
            parts.append(f"it is better than {names(beaten)}")
        if open_:
            parts.append(f"against {names(open_)}, no difference shown")
        if untested:
            parts.append(f"against {names(untested)} nothing could be tested ({_takes(analysis)})")
    return _capital("; ".join(parts) + ".")


def _untold(analysis: Analysis, others: Sequence[str], shared: Sequence[int]) -> str:
    """Why nothing at all can be said of the best one's lead."""
    most = max(shared, default=0)
    if most >= analysis.least_seeds:
        return "How sure its lead is cannot be told, as nothing varies between these trials."
    there = {0: "it shares none with them", 1: "there is one", 2: "there are two"}.get(most, f"there are {most}")
    return f"Nothing can be shown of how it stands to {names(others)}: {_takes(analysis)}, and {there}."


def _takes(analysis: Analysis) -> str:
    return f"that takes at least {analysis.least_seeds} seeds that both finished"


def against(analysis: Analysis, c: Contender) -> str:
    """How a contender stands to the reference, as "−0.0028, no difference shown"."""
    if c.name == analysis.reference:
        return "reference"
    d = analysis.difference(c.name, analysis.reference) if analysis.reference else None
    return f"{signed(d.value, digits(analysis))}, {d.verdict}" if d else NOTHING


def in_common(d: Difference) -> str:
    """How many seeds two contenders share, as "2 seeds in common"."""
    return "1 seed in common" if len(d.seeds) == 1 else f"{len(d.seeds)} seeds in common"


def _held(analysis: Analysis, d: Difference) -> str:
    n = digits(analysis)
    gap = f"{signed(d.value, n)} ({between(d.interval, n, sign=True)})"
    return f"it is better by {gap}" if d.verdict == "better" else f"the difference is {gap}: {d.verdict}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def grid(s: Sensitivity) -> str:
    """The rates that were tried, as "0.001, 0.002, 0.005, 0.01; 1 of them added, as the best was at the edge; no seed finished at 0.01"."""
    text = ", ".join(f"{p.rate:g}" for p in s.points)
    if s.added:
        text += f"; {s.added} of them added, as the best was at the edge"
    failed = [f"{p.rate:g}" for p in s.points if p.mean is None and p.failed]
    return text + (f"; no seed finished at {names(failed)}" if failed else "")


def method(analysis: Analysis) -> str:
    """Says in a short paragraph how the results were computed."""
    least = analysis.least_seeds
    rows = f"test rows than these {analysis.rows or 0:,}"
    text = (
        f"The learning rate of each contender is the one with the best mean {words(analysis.metric)} on validation rows; "
        "rates at which a seed failed come last. Only then are the test rows looked at. That another rate might have been chosen is "
        "not in the intervals. "
    )
    text += {
        "seeds and rows": f"A 95 % interval allows for other seeds and for other {rows}.",
        "rows": f"With one seed, an interval allows only for other {rows}: it is of the one model that was trained.",
        "seeds": "A 95 % interval allows for other seeds, and not for other test rows.",
        "nothing": f"An interval takes at least {least} seeds, so none is given.",
    }[analysis.over]
    if analysis.over != "nothing":
        text += " The interval of a contender is for it alone."
    tested = [d for d in analysis.differences if d.interval]
    if tested:
        held = sum(analysis.reference in (d.a, d.b) for d in tested)
        text += " " + _family(analysis, held, len(tested) - held)
        text += " “No difference shown” means that the interval holds 0; it does not mean that the two are equal."
    if len(tested) < len(analysis.differences):
        text += f" “Not tested” means that the two finished fewer than {least} seeds in common, or that nothing varies between them."
    return text


def _family(analysis: Analysis, held: int, others: int) -> str:
    """What the intervals of differences promise together."""
    if held + others == 1:
        return "One difference was tested, so there is nothing to adjust its interval for."
    counts = ((held, f"against {analysis.reference}"), (others, "between other contenders"))
    told = [
        f"the {n:,} {what} hold together with 95 % probability"
        if n > 1
        else f"the one {what} holds with 95 % probability"
        for n, what in counts
        if n
    ]
    return (
        f"Intervals of differences are adjusted for their number: {', and '.join(told)}. How much seeds matter is pooled over the "
        "contenders; where their spreads are unequal, the intervals are longer for it."
    )
