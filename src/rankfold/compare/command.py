"""`rankfold compare`: what the command line calls once it has parsed."""

from __future__ import annotations

from pathlib import Path

from rankfold.compare.contenders import Lineup, resolve
from rankfold.compare.executors import Executor
from rankfold.compare.experiment import check_folder, compare
from rankfold.compare.file import CompareFile
from rankfold.compare.trial_file import FILE, read
from rankfold.compare.trial_list import wanted


def run_compare(
    file: CompareFile,
    *,
    dry_run: bool = False,
    report_only: bool = False,
    workers: int = 1,
    kind: Executor = "local",
    retry_failed: bool = False,
    command: str = "",
) -> None:
    """Runs the trials that are missing and writes the report; or only says what would be run; or only writes the report.

    Raises:
        FolderError, DataError, ModelError, ValueError: what cannot be compared, before anything runs.
    """
    out = Path(file.output)
    if dry_run:
        check_folder(file)
        _print_plan(resolve(file), file)
        return
    if report_only:
        if not (out / FILE).is_file():
            raise FileNotFoundError(f"'{out}' has no {FILE}, so there is nothing to report yet")
    else:
        compare(file, workers=workers, kind=kind, retry_failed=retry_failed, command=command)
    from rich.console import Console

    from rankfold.compare.report import write_report
    from rankfold.compare.statistics import analyse
    from rankfold.compare.table import show

    page = write_report(out)
    console = Console()
    (console if console.is_terminal else Console(width=max(console.width, 120))).print(show(analyse(read(out / FILE))))
    print(f"wrote {page}")


def _print_plan(lineup: Lineup, file: CompareFile) -> None:
    from rich.console import Console
    from rich.table import Table

    done = {line.id: line for line in read(Path(file.output, FILE))}
    table = Table(title="comparison (nothing was trained)", title_justify="left", box=None, pad_edge=False)
    for name in ("contender", "where", "trained", "of budget", "head", "fields"):
        table.add_column(name, justify="right" if name in ("trained", "of budget", "head") else "left")
    for e in lineup.entries:
        share = f"{e.trained / lineup.budget:.1%}" if e.trained is not None and lineup.budget else ""
        numbers = ("", "", "") if e.trained is None else (f"{e.trained:,}", share, f"{e.head:,}")
        fields = ", ".join(f"{k} {v}" for k, v in e.method.items() if k != "name")
        table.add_row(e.label, e.where, *numbers, f"cannot be trained: {e.reason}" if e.reason else fields)
    console = Console()
    console.print(table)
    known = [wanted(e, file, done) for e in lineup.entries]
    trials = [t for found, _ in known for t in found]
    total, there = len(trials) + sum(later for _, later in known), sum(t.id in done for t in trials)
    rows = ", ".join(f"{count:,} {split}" for split, count in lineup.rows.items())
    console.print(
        f"{total:,} trials of at most {lineup.steps:,} steps"
        + (f", {there:,} of them done already" if there else "")
        + f"; {rows} rows",
        highlight=False,
    )
    print(*lineup.notes, sep="\n")
