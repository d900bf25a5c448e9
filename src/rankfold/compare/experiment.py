"""`rankfold compare`: runs every trial that the compare file asks for and that is still missing, and writes one line per trial."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from rankfold.compare.contenders import Lineup, resolve
from rankfold.compare.executors import Executor, Submit, executor
from rankfold.compare.file import CompareFile, load
from rankfold.compare.time_left import Estimate
from rankfold.compare.trial_file import FILE, TrialLine, append, read
from rankfold.compare.trial_list import Trial, relabelled, wanted
from rankfold.compare.trial_process import JOB
from rankfold.errors import RankfoldError
from rankfold.io.files import write_whole
from rankfold.runfile.optimizers import CLIP
from rankfold.text import changes, duration
from rankfold.train.folder import FolderError

COPY = "compare.yaml"
SHARED = ("model", "task", "data", "training", "launch")


def compare(
    file: CompareFile,
    *,
    workers: int = 1,
    kind: Executor = "local",
    retry_failed: bool = False,
    command: str = "",
    say: Callable[[str], None] = print,
) -> Path:
    """Runs the missing trials. Trials in the output folder are not repeated.

    Args:
        workers: trials at a time; they share the cores.
        retry_failed: try failed trials again (a diverged trial is a result, not a failure).
        command: how the comparison was started, for its lines.
        say: called with each sentence for the reader.

    Returns:
        The comparison's folder.

    Raises:
        FolderError: the folder is another comparison's, or in use. DataError, ModelError, ValueError: before anything runs.
    """
    if workers < 1:
        raise RankfoldError(f"--workers {workers}: must be at least 1")
    out = Path(file.output)
    check_folder(file)
    lineup = resolve(file)
    lines = read(out / FILE)
    check_rows(lineup, file, lines)
    check_labels(lineup, file, lines)
    for sentence in [*lineup.notes, *refusals(lineup)]:
        say(sentence)
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FolderError(f"output: another `rankfold compare` is at work in '{out}'") from None
    try:
        write_whole(out / COPY, file.to_yaml(command or "rankfold.compare.experiment.compare"))
        with executor(kind, workers, file.launch) as submit:
            _Comparison(file, lineup, out, workers, command, say, submit).run(retry_failed)
    finally:
        lock.release()
    return out


@dataclass
class _Comparison:
    file: CompareFile
    lineup: Lineup
    out: Path
    workers: int
    command: str
    say: Callable[[str], None]
    submit: Submit

    def run(self, retry_failed: bool) -> None:
        done = {line.id: line for line in read(self.out / FILE)}
        estimate = Estimate()
        self._relabel(done)
        again = {i for i, line in done.items() if retry_failed and line.status == "failed"}
        trials, _ = self.wanted(done)
        for trial in trials:
            line = done.get(trial.id)
            if line and line.wall_seconds and line.status == "done":
                estimate.add(trial, line.wall_seconds)
            if trial.id in again:
                (trial.folder / f"{trial.id}.json").unlink(missing_ok=True)
        done = {i: line for i, line in done.items() if i not in again}
        if kept := sum(t.id in done for t in trials):
            self.say(f"{kept} trials are done already and are not repeated")
        running: dict[Future[TrialLine], Trial] = {}
        while True:
            trials, later = self.wanted(done)
            busy = {t.id for t in running.values()}
            for trial in (t for t in trials if t.id not in done and t.id not in busy):
                running[self._start(trial)] = trial
            if not running:
                return
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in [f for f in running if f in finished]:  # in the order of their start
                trial, line = running.pop(future), future.result()
                append(self.out / FILE, line)
                done[trial.id] = line
                if line.wall_seconds and line.status == "done":
                    estimate.add(trial, line.wall_seconds)
                left = [t for t in trials if t.id not in done]
                of = f"[{sum(t.id in done for t in trials)}/{len(trials) + later}]"
                parts = [f"{of} {trial.name()}: {result(line)}", estimate.words(left, later, self.workers)]
                self.say("; ".join(part for part in parts if part and (left or later or part is parts[0])))

    def wanted(self, done: dict[str, TrialLine]) -> tuple[list[Trial], int]:
        """Takes one trial of each contender in turn, so that early results cover all of them."""
        found = [wanted(entry, self.file, done) for entry in self.lineup.entries]
        turns = sorted((number, i) for i, (trials, _) in enumerate(found) for number in range(len(trials)))
        unique = {found[i][0][number].id: found[i][0][number] for number, i in turns}
        return list(unique.values()), sum(later for _, later in found)

    def _start(self, trial: Trial) -> Future[TrialLine]:
        line = replace(trial.line, command=self.command, rows=self.lineup.digest)
        if line.reason is not None:  # known not to work
            future: Future[TrialLine] = Future()
            future.set_result(line)
            return future
        measured = trial.folder / f"{trial.id}.json"
        if measured.is_file():  # its line was not yet written when the comparison was killed
            future = Future()
            future.set_result(TrialLine.from_json(measured.read_text(encoding="utf-8")))
            return future
        trial.folder.mkdir(parents=True, exist_ok=True)
        write_whole(trial.folder / JOB, json.dumps({"line": asdict(line), "until": trial.until}, indent=1))
        return self.submit(trial.folder, line)

    def _relabel(self, done: dict[str, TrialLine]) -> None:
        trials, _ = self.wanted(done)
        for old, label, where in list(relabelled(trials, self.lineup.entries, done)):
            done[old.id] = replace(old, label=label, where=where)
            append(self.out / FILE, done[old.id])


def result(line: TrialLine) -> str:
    """A finished trial in words; its test value is for the report alone."""
    if line.status != "done":
        return f"{line.status}: {line.reason}"
    took = f" ({duration(line.wall_seconds)})" if line.wall_seconds else ""
    return f"validation {line.metric.replace('_', ' ')} {line.validation:.4f}{took}"


def refusals(lineup: Lineup) -> list[str]:
    """A sentence for every contender that cannot be trained."""
    return [f"{e.name()} cannot be trained: {e.reason}" for e in lineup.entries if e.reason]


# --- the folder -----------------------------------------------------------------------------------------------------------


def check_folder(file: CompareFile) -> None:
    """Checks that this comparison may continue in its folder. Trials on other rows or with other steps could not be compared.

    Raises:
        FolderError: it is something else's, or another comparison's.
    """
    out = Path(file.output)
    if out.exists() and not out.is_dir():
        raise FolderError(f"output: '{out}' is a file; name a folder")
    before = out / COPY
    if not before.is_file():
        if out.is_dir() and any(entry.name != ".lock" for entry in out.iterdir()):
            raise FolderError(f"output: '{out}' is not empty and holds no comparison; name another folder")
        return
    earlier = load(before)
    old, new = (f.model_dump(include=set(SHARED)) for f in (earlier, file))
    # Earlier versions wrote the default as 1; what a contender's trials had, their ids tell
    for values in (old, new):
        if values["training"]["max_grad_norm"] is None:
            values["training"]["max_grad_norm"] = CLIP
    changed = [p for key in SHARED for p in changes(key, old[key], new[key])]
    if changed:
        raise FolderError(
            f"output: the trials in '{out}' had other settings: {'; '.join(changed)}. Undo the change, or name another output"
        )
    if not set(file.rungs) <= set(earlier.rungs):
        raise FolderError(
            f"output: search: trials in '{out}' may be past the rungs that it asks for now, and could only be measured where they are. "
            "Undo the change, or name another output"
        )


def check_rows(lineup: Lineup, file: CompareFile, lines: list[TrialLine]) -> None:
    """Checks that files under the same names hold the same rows: trials are compared row by row.

    Raises:
        FolderError: they held others when a trial was run.
    """
    for line in lines:
        if line.wall_seconds is not None and line.rows not in (None, lineup.digest):
            raise FolderError(
                f"output: the rows of data were others when '{line.label}' in '{file.output}' was run, though their names are the "
                "same. Restore the files, or name another output"
            )


def check_labels(lineup: Lineup, file: CompareFile, lines: list[TrialLine]) -> None:
    """Checks that one label means one thing in the report.

    Raises:
        FolderError: a contender was something else when trials of it were run.
    """
    for line in lines:
        for entry in lineup.entries:
            now = {k: v for k, v in entry.method.items() if k != "name"}
            if (line.label, line.where) != (entry.label, entry.where) or line.wall_seconds is None:  # it never ran
                continue
            changed = changes("name", line.method, entry.method["name"]) + changes("", line.config, now)
            changed += changes("", line.training, entry.training)
            if changed:
                raise FolderError(
                    f"output: '{entry.name()}' was another one when its trials in '{file.output}' were run "
                    f"({'; '.join(changed)}); give the new one another label, or name another output"
                )
