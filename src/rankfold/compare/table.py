"""A comparison in the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from rankfold import text
from rankfold.compare import wording as say
from rankfold.compare.analysis import Analysis, Contender


def _trained(c: Contender) -> str:
    if c.trained is None:
        return say.NOTHING
    return say.short(c.trained) if c.live in (None, c.trained) else f"{say.short(c.live)} of {say.short(c.trained)}"


def show(analysis: Analysis) -> Group:
    """The answer, one row per contender with the best test metric first, the warnings, and the trials that did not finish."""
    n = say.digits(analysis)
    table = text.table()
    table.add_column("contender", overflow="fold")
    table.add_column("rate", justify="right", no_wrap=True)
    table.add_column(f"test {say.words(analysis.metric)}", justify="right", no_wrap=True)
    table.add_column("95 % interval", no_wrap=True)
    table.add_column("seeds", justify="right", no_wrap=True)
    table.add_column("trained", justify="right", no_wrap=True)
    table.add_column("kept", justify="right", no_wrap=True)
    table.add_column(f"against {analysis.reference}")
    for c in analysis.ranked:
        failed = f" of {len(c.seeds) + len(c.failed)}" if c.failed else ""
        table.add_row(
            Text(c.name),  # a label may hold square brackets
            f"{c.rate:g}",
            say.number(c.test, n),
            say.between(c.interval, n),
            f"{len(c.seeds)}{failed}",
            _trained(c),
            say.short(c.kept) if c.kept is not None else say.NOTHING,
            say.against(analysis, c),
        )
    parts: list[RenderableType] = [Text(say.answer(analysis)), Text("")]
    if analysis.contenders:
        parts.append(table)
    parts += [
        Text(
            f"{c.name} trains {say.count(c.live)} parameters at a time, at most; kept: what its links add up to",
            style="dim",
        )
        for c in analysis.ranked
        if c.live is not None
    ]
    searched = [c for c in analysis.ranked if c.sensitivity.added is not None]
    parts += [Text(f"rates tried with {c.name}: {say.grid(c.sensitivity)}", style="dim") for c in searched]
    parts += [Padding(Text(f"! {warning}"), (1, 0, 0, 0)) for warning in analysis.warnings]
    if analysis.failures:
        parts.append(
            Padding(
                Text(f"{len(analysis.failures)} of {analysis.trials} trials did not finish:", style="bold"),
                (1, 0, 0, 0),
            )
        )
        for f in analysis.failures:
            parts.append(Text(f"  {f.name}, rate {f.rate:g}, seed {f.seed}: {f.status}, {f.reason}"))
    return Group(*parts)
