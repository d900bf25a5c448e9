"""`rankfold compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rankfold.commands.command import CommonOptions, option, positional
from rankfold.commands.terminal import command_line

if TYPE_CHECKING:
    from rankfold.compare.contenders import Lineup
    from rankfold.compare.file import CompareFile
    from rankfold.compare.rates import RateGrid

INTERRUPTED = "interrupted; the same command goes on where this one stopped"


@dataclass(kw_only=True)
class Options(CommonOptions):
    """find out which method is best on your model and data, at one budget"""

    compare_file: str = positional("the compare file", metavar="compare.yaml")
    overrides: list[str] = positional("for instance seeds=[0,1]", default=[], nargs="*", metavar="key=value")
    dry_run: bool = option("print contenders, parameters and trials; train nothing", default=False)
    workers: int = option("trials at a time, which share the cores", default=1)
    executor: Literal["local", "ray"] = option("where trials run", default="local")
    retry_failed: bool = option("try failed trials again", default=False)
    report_only: bool = option("write the report of the trials that are there", default=False)


def run(options: Options) -> int:
    """Runs the trials that are missing and writes the report; or only says what would be run; or only writes the report.

    Raises:
        FolderError, DataError, ModelError, RankfoldError: what cannot be compared, before anything runs.
    """
    from rankfold.compare.contenders import resolve
    from rankfold.compare.experiment import check_folder, compare
    from rankfold.compare.file import load
    from rankfold.compare.trial_file import FILE

    file = load(options.compare_file, options.overrides)
    out = Path(file.output)
    if options.dry_run:
        check_folder(file)
        print_plan(resolve(file), file)
        return 0
    if options.report_only:
        if not (out / FILE).is_file():
            raise FileNotFoundError(f"'{out}' has no {FILE}, so there is nothing to report yet")
    else:
        compare(
            file,
            workers=options.workers,
            kind=options.executor,
            retry_failed=options.retry_failed,
            command=command_line(),
        )
    print_report(out)
    return 0


def print_report(out: Path) -> None:
    """Writes report.html of the trials in `out` and prints its verdicts."""
    from rankfold.compare.report import write_report
    from rankfold.compare.statistics import analyse
    from rankfold.compare.table import show
    from rankfold.compare.trial_file import FILE, read
    from rankfold.text import terminal

    page = write_report(out)
    terminal(least=120).print(show(analyse(read(out / FILE))))
    print(f"wrote {page}")


def _rates(grid: RateGrid | None) -> dict[str, str]:
    if grid is None:
        return {}
    return {"rates": f"{', '.join(f'{rate:g}' for rate in grid.first)}{' and beyond' if grid.most else ''}"}


def print_plan(lineup: Lineup, file: CompareFile) -> None:
    """Prints contenders, trials and rows."""
    from rich.table import Table

    from rankfold.compare.trial_file import FILE, read
    from rankfold.compare.trial_list import wanted
    from rankfold.text import terminal

    done = {line.id: line for line in read(Path(file.output, FILE))}
    table = Table(title="comparison (nothing was trained)", title_justify="left", box=None, pad_edge=False)
    for name in ("contender", "where", "trained", "of budget", "head", "fields"):
        table.add_column(name, justify="right" if name in ("trained", "of budget", "head") else "left")
    for e in lineup.entries:
        share = f"{e.trained / lineup.budget:.1%}" if e.trained is not None and lineup.budget else ""
        numbers = ("", "", "") if e.trained is None else (f"{e.trained:,}", share, f"{e.head:,}")
        own = {k: v for k, v in e.training.items() if k != "optimizer_options"} | e.training.get(
            "optimizer_options", {}
        )
        given = {**e.method, **own, **_rates(e.grid)}
        fields = ", ".join(f"{k} {v}" for k, v in given.items() if k != "name")
        table.add_row(e.label, e.where, *numbers, f"cannot be trained: {e.reason}" if e.reason else fields)
    console = terminal()
    console.print(table)
    known = [wanted(e, file, done) for e in lineup.entries]
    trials = [t for found, _ in known for t in found]
    total, there = len(trials) + sum(later for _, later in known), sum(t.id in done for t in trials)
    rows = ", ".join(f"{count:,} {split}" for split, count in lineup.rows.items())
    console.print(
        f"{'at least ' if any(e.grid and e.grid.most for e in lineup.entries) else ''}{total:,} trials of at most {lineup.steps:,} steps"
        + (f", {there:,} of them done already" if there else "")
        + f"; {rows} rows",
        highlight=False,
    )
    print(*lineup.notes, sep="\n")
