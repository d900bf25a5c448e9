"""Writes the warnings that a reader must see before trusting a comparison's results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rankfold.compare import wording as say
from rankfold.compare.analysis import Analysis
from rankfold.compare.trial_file import TrialLine


def cautions(analysis: Analysis, lines: Sequence[TrialLine], trials: Sequence[TrialLine]) -> list[str]:
    """The sentences, the gravest first.

    Args:
        lines: all of the comparison; trials: those that the means are made of.
    """
    found = []
    for name in analysis.unfinished:
        found.append(f"{name} has no finished trial and is in no table of results.")
    for c in analysis.contenders:
        if c.failed:
            of = len(c.seeds) + len(c.failed)
            found.append(
                f"{c.name}: {len(c.failed)} of {of} seeds did not finish at its learning rate {c.rate:g} "
                f"({_seeds(c.failed)}); its mean is over the others and may flatter it."
            )
        if c.missing:
            found.append(f"{c.name} was not tried with {_seeds(c.missing)} at its learning rate {c.rate:g}.")
    edges: dict[str, list[str]] = {"lowest": [], "highest": [], "only": []}
    for c in analysis.contenders:
        if c.sensitivity.edge and c.sensitivity.added is not None:
            found.append(
                f"{c.name}: the best learning rate ({c.rate:g}) is still at the edge of the grid ({say.grid(c.sensitivity)}): a better one may "
                "lie outside; raise `most` in rates, or finish the comparison."
            )
        elif c.sensitivity.edge:
            edges[c.sensitivity.edge].append(f"{c.name} ({c.rate:g})")
    for edge in ("lowest", "highest"):
        if edges[edge]:
            found.append(
                f"The best learning rate is the {edge} one tried for {', '.join(edges[edge])}: "
                "the grid may be too small, and a better rate may lie outside."
            )
    if edges["only"]:
        found.append(f"Only one learning rate was tried for {', '.join(edges['only'])}: it was not tuned.")
    found += _few_seeds(analysis)
    alike = [c.name for c in analysis.contenders if c.interval and c.interval[0] == c.interval[1]]
    if alike:
        found.append(
            f"Nothing varies in the scores of {', '.join(alike)}: how sure they are cannot be told, and the "
            "interval has no length."
        )
    if analysis.rows and analysis.rows < 30:
        found.append(f"There are {analysis.rows} test rows: too few to trust an interval.")
    if not analysis.rows and trials:
        found.append(
            f"The scores of the test rows do not make up {analysis.metric} (or are missing): what other test rows would "
            "change is not in the intervals."
        )
    trained = [count for c in analysis.contenders if (count := c.live or c.trained)]
    if trained and max(trained) > 1.05 * min(trained):
        found.append(
            f"The contenders do not have one budget: {min(trained):,.0f} to {max(trained):,.0f} trained parameters."
        )
    found += [f"The trials do not share `{key}`: the comparison is not fair." for key in _unshared(lines)]
    hosts = {(t.host, t.threads) for t in trials}
    if len(hosts) > 1:
        found.append("Trials ran on different machines or numbers of threads: their times cannot be compared.")
    return found


def _few_seeds(analysis: Analysis) -> list[str]:
    """Says what cannot be shown, and how many seeds that would take."""
    least = analysis.least_seeds
    most = max((len(c.seeds) for c in analysis.contenders), default=0)
    takes = f"no difference between contenders can be shown: that takes at least {least} seeds"
    if most == 1:
        rows = "each interval is of one model on other test rows" if analysis.rows else "no interval can be given"
        return [f"There is one seed: {rows}, and {takes}."]
    if 1 < most < least:
        return [f"There are {most} seeds: no interval can be given, and {takes}."]
    found = [
        f"{c.name} finished {len(c.seeds)} {'seed' if len(c.seeds) == 1 else 'seeds'}: it has no interval and is not tested against any "
        f"other; that takes at least {least} seeds."
        for c in analysis.contenders
        if len(c.seeds) < least
    ]
    if least <= most < 5:
        found.append(
            f"{most} seeds hardly tell how much the result moves with the seed; the intervals are long for it."
        )
    return found


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _unshared(lines: Sequence[TrialLine]) -> list[str]:
    """Keys of the run file that every trial of a comparison should have in common, and does not."""

    def shared(run: dict[str, Any]) -> dict[str, Any]:
        training = run.get("training") or {}
        flat = {key: run.get(key) for key in ("model", "task", "data")}
        own = ("learning_rate", "seed", "optimizer", "optimizer_options")
        return flat | {f"training.{key}": value for key, value in training.items() if key not in own}

    runs = [shared(line.run) for line in lines if line.run]
    keys = list(dict.fromkeys(key for run in runs for key in run))
    return [key for key in keys if any(run.get(key) != runs[0].get(key) for run in runs)]
