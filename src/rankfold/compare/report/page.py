"""Fills the report's template."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from rankfold.compare import wording as say
from rankfold.compare.analysis import Analysis, Contender
from rankfold.compare.report import charts
from rankfold.compare.report.svg import badge
from rankfold.compare.trial_file import TrialLine
from rankfold.host import registry


def render(analysis: Analysis, lines: Sequence[TrialLine], specification: str | None) -> str:
    """The page's text.

    Args:
        lines: that the analysis was made of.
        specification: text of compare.yaml, shown as it is.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    trials = {c.name: _finished(c, lines) for c in analysis.contenders}
    environment = Environment(
        loader=PackageLoader("rankfold.compare.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"safe_svg": Markup, "count": say.count}
    environment.globals |= {"say": say, "n": say.digits(analysis)}
    run = lines[-1].run
    before = [c.before for c in analysis.contenders if c.before is not None]
    return environment.get_template("template.html").render(
        title=_title(run),
        style=Markup(environment.loader.get_source(environment, "style.css")[0]),  # pyright: ignore
        a=analysis,
        metric=say.words(analysis.metric),
        answer=say.answer(analysis),
        method=say.method(analysis),
        badges={c.name: Markup(badge(i)) for i, c in enumerate(analysis.contenders)},
        before=fmean(before) if before else None,
        several=len(analysis.contenders) > 1,
        pictures=_pictures(analysis, trials),
        pairs=sorted(analysis.differences, key=lambda d: abs(d.value), reverse=True),
        chosen_with=_chosen_with(analysis),
        commands=list(dict.fromkeys(line.command for line in lines if line.command)),
        versions=_versions(lines),
        machines=sorted({(line.host or "unknown", line.threads or 0) for line in lines}),
        specification=specification,
    )


def _finished(c: Contender, lines: Sequence[TrialLine]) -> list[TrialLine]:
    """The trials that a contender's results come from."""
    own = [t for t in lines if (t.label, t.where, t.rate) == (c.label, c.where, c.rate)]
    last = {t.seed: t for t in own if t.status == "done" and t.rung is None}
    return [last[seed] for seed in c.seeds]


def _pictures(analysis: Analysis, trials: dict[str, list[TrialLine]]) -> dict[str, list[charts.Picture]]:
    """By section of the page; a section without a picture is left out."""
    if not analysis.contenders:
        return {}

    def per_second(tokens: float) -> str:
        return f"{tokens:,.0f}"

    found: dict[str, list[charts.Picture | None]] = {
        "results": [
            charts.results(analysis),
            charts.parameters(analysis, "trained"),
            charts.parameters(analysis, "kept"),
        ],
        "curves": [charts.curves(analysis, trials, "loss"), charts.curves(analysis, trials, "validation")],
        "rates": [charts.rates(analysis)],
        "cost": [
            charts.bars(
                analysis, "seconds", "Seconds in optimiser steps, mean over trials.", lambda c: c.seconds, say.duration
            ),
            charts.bars(analysis, "speed", "Tokens per second in training.", lambda c: c.tokens_per_second, per_second),
            charts.bars(analysis, "memory", "Peak memory of a trial.", lambda c: c.peak_bytes, say.size),
        ],
        "ranks": [
            charts.ranks(c, trials[c.name], index)
            for index, c in enumerate(analysis.contenders)
            if chooses_ranks(trials[c.name])
        ],
    }
    kept = {section: [p for p in some if p is not None] for section, some in found.items()}
    return {section: some for section, some in kept.items() if some}


def chooses_ranks(trials: Sequence[TrialLine]) -> bool:
    """Whether ranks by layer are an outcome: they differ, and a schedule or a plan by layer made them so.

    Of the methods here the registry tells which have a schedule. One of PEFT's has no row; where its ranks differ, it chose them.
    """
    first = trials[0]
    row = registry.METHODS.get(first.method)
    scheduled = row is None or row.controller is not None
    differ = len({rank for t in trials for rank in t.ranks.values()}) > 1
    return bool(first.ranks) and differ and (scheduled or bool(first.config.get("rank_pattern")))


def _title(run: dict[str, Any]) -> str:
    model, data = run.get("model"), run.get("data")
    name = model.get("name") if isinstance(model, dict) else model
    source = (data.get("source") or data.get("train")) if isinstance(data, dict) else data
    return " on ".join(str(part) for part in (name, source) if part) or "a comparison"


def _chosen_with(analysis: Analysis) -> list[tuple[Contender, str]]:
    """A line on the rates of each contender: the chosen one, where it stands, the spread."""
    found = []
    for c in analysis.contenders:
        s = c.sensitivity
        where = {
            None: f"{s.steps_to_edge} {'rate' if s.steps_to_edge == 1 else 'rates'} from the edge of the grid",
            "only": "the only one tried",
            "lowest": "the lowest one tried: the grid may be too small",
            "highest": "the highest one tried: the grid may be too small",
        }[s.edge]
        spread = "" if s.spread is None else f"; best to worst rate {say.number(s.spread, say.digits(analysis))}"
        if spread and any(p.first is not None for p in s.points):
            spread += " at the first rung"
        seeds = (
            ""
            if s.seeds == tuple(sorted((*c.seeds, *c.failed)))
            else f"; chosen with seed{'s' if len(s.seeds) > 1 else ''} {', '.join(map(str, s.seeds))}"
        )
        found.append((c, f"{s.best:g}, {where} ({say.grid(s)}){spread}{seeds}."))
    return found


def _versions(lines: Sequence[TrialLine]) -> list[tuple[str, str]]:
    """Package and version; all of them where trials ran with several."""
    found: dict[str, list[str]] = {}
    for line in lines:
        for name, version in line.versions.items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return [(name, ", ".join(versions)) for name, versions in found.items()]
