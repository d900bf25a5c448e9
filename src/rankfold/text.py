"""Values for people: numbers, short representations, changed settings, and the one style of tables and where they go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def count(n: float) -> str:
    """A number for a narrow column: exact below a million, four digits above.

    >>> count(337_920), count(1_234_567)
    ('337,920', '1.235M')
    """
    for unit, letter in ((1e9, "B"), (1e6, "M")):
        if abs(n) >= unit:
            return f"{n / unit:.4g}{letter}"
    return f"{n:,.0f}"


def decimals(x: float, digits: int = 4) -> str:
    """A number with so many decimals, and never a zero with a minus.

    >>> decimals(-0.00001), decimals(-0.5)
    ('0.0000', '-0.5000')
    """
    return f"{round(x, digits) + 0.0:.{digits}f}"


def size(n: float) -> str:
    """Bytes in three digits, in units of 1000.

    >>> size(512), size(4_200), size(412_345_678), size(999_900_000)
    ('512 B', '4.2 kB', '412 MB', '1 GB')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(n) >= 0.9995 * unit:
            return f"{n / unit:.3g} {name}" if abs(n) < 999.5 * unit else f"{n / unit:,.0f} {name}"
    return f"{n:.0f} B"


def duration(seconds: float, digits: int = 3) -> str:
    """A time in seconds, minutes or hours, whichever has the fewest digits before the point.

    >>> duration(50), duration(754, digits=2), duration(12_600)
    ('50 s', '13 min', '3.5 h')
    """
    for unit, name, least in ((3600.0, "h", 90 * 60), (60.0, "min", 90)):
        if seconds >= least:
            value = seconds / unit
            return f"{value:.0f} {name}" if value >= 10 ** (digits - 1) else f"{value:.{digits}g} {name}"
    return f"{seconds:.{digits}g} s"


def short_number(x: float) -> str:
    """The two or three digits that matter, in at most five characters.

    >>> short_number(0.00012), short_number(0.123), short_number(12.345), short_number(345.6)
    ('1e-04', '0.12', '12.3', '346')
    """
    if x == 0:
        return "0"
    if x < 0.0095 or x >= 99999.5:
        return f"{x:.0e}"
    return f"{x:.0f}" if x >= 99.5 else f"{x:.3g}" if x >= 1 else f"{x:.2g}"


def short_repr(value: object, most: int = 60) -> str:
    """A value's repr for a sentence, cut after `most` characters."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def one_line(error: BaseException | None) -> str:
    """An error's message without its line breaks, or its name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException | None) -> str:
    """The first line of an error's message, or its name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def examples(names: Sequence[str]) -> str:
    """The first of some names, and how many there are.

    >>> examples(["a", "b", "c"])
    'a and 2 more'
    """
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def changes(path: str, old: object, new: object) -> list[str]:
    """What differs between two settings, one phrase per value; dicts are compared key by key.

    >>> changes("method", {"r": 8, "bias": "none"}, {"r": 4, "bias": "none"})
    ['method.r was 8, is 4']
    """
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [changes(f"{path}.{key}".lstrip("."), old.get(key), new.get(key)) for key in {**old, **new}]
        return [change for part in parts for change in part]
    return [] if old == new else [f"{path} was {old!r}, is {new!r}"]


def table(*columns: str, title: str | None = None, gap: int = 2) -> Table:
    """An empty table in the style of every command: no lines, bold headings.

    Args:
        columns: headings of left-aligned columns; others can be added later.
        title: bold, above it.
        gap: spaces between columns.
    """
    from rich.table import Table

    return Table(
        *columns,
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, gap, 0, 0),
    )


def terminal(least: int = 0) -> Console:
    """Where a command prints its tables. What stands in square brackets or between colons is a part of a name, and no markup.

    Args:
        least: columns, where nobody watches.
    """
    from rich.console import Console

    found = Console(markup=False, emoji=False)
    return found if found.is_terminal or found.width >= least else Console(width=least, markup=False, emoji=False)
