"""Where trials run: processes of this machine, or tasks of a Ray cluster. Either way one process per trial, started alike."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rankfold.compare.trial_file import TrialLine
from rankfold.compare.trial_process import JOB
from rankfold.errors import RankfoldError

Executor = Literal["local", "ray"]
Submit = Callable[[Path, TrialLine], "Future[TrialLine]"]
"""Takes a trial's folder and the line that defines it; returns the measured line."""

LOG = "log.txt"


def cores() -> int:
    """Of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def executor(kind: Executor, workers: int, launch: str | None) -> Iterator[Submit]:
    """Runs what is submitted, `workers` trials at a time; leaving the context ends what still runs.

    Each trial has its share of the cores as threads, or as many as your OMP_NUM_THREADS says.

    Args:
        workers: for ray, how many trials share the cores of one machine like this one.
        launch: what to start a trial with, such as "accelerate launch --num_processes 2".

    Raises:
        ModuleNotFoundError, ValueError: ray is not installed, or asked to launch.
    """
    yours = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(yours) if yours.isdecimal() else max(1, cores() // workers)
    with _ray(threads, launch) if kind == "ray" else _local(workers, threads, launch) as submit:
        yield submit


@contextmanager
def _local(workers: int, threads: int, launch: str | None) -> Iterator[Submit]:
    running: set[subprocess.Popen[bytes]] = set()
    futures: list[Future[TrialLine]] = []
    pool = ThreadPoolExecutor(workers)

    def submit(folder: Path, line: TrialLine) -> Future[TrialLine]:
        futures.append(pool.submit(run_process, folder, line, threads, launch, running=running))
        return futures[-1]

    try:
        yield submit
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        while not all(f.done() for f in futures):
            for process in list(running):
                _end(process)
            time.sleep(0.02)  # one may be about to start its process


@contextmanager
def _ray(threads: int, launch: str | None) -> Iterator[Submit]:
    if launch is not None:
        raise RankfoldError(
            "launch: trials of several processes run on the local executor only; remove launch, or --executor ray"
        )
    try:
        import ray
    except ModuleNotFoundError:
        raise ModuleNotFoundError("--executor ray needs the package 'ray': pip install 'rankfold[ray]'") from None
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, configure_logging=False)
    # A GPU each where there are some; a trial that was lost with its node is begun again by the next call, not by Ray.
    task = ray.remote(
        num_cpus=min(threads, int(ray.cluster_resources().get("CPU", 1))),
        num_gpus=1 if ray.cluster_resources().get("GPU") else 0,
        max_retries=0,
    )(run_process)
    refs = []

    def submit(folder: Path, line: TrialLine) -> Future[TrialLine]:
        refs.append(task.remote(folder.absolute(), line, threads, None, directory=Path.cwd()))  # pyright: ignore[reportCallIssue]
        return refs[-1].future()

    try:
        yield submit
    finally:
        for ref in refs:
            ray.cancel(ref, force=True)
        if started:
            ray.shutdown()


def run_process(
    folder: Path,
    line: TrialLine,
    threads: int,
    launch: str | None,
    *,
    directory: Path | None = None,
    running: set[subprocess.Popen[bytes]] | None = None,
) -> TrialLine:
    """Runs one trial, whose job is in its folder, to its end.

    Args:
        threads: of computation.
        directory: to run in; relative paths of the compare file start there.
        running: holds the process while it runs.
    """
    if not (folder / JOB).is_file():
        reason = f"{folder} is not visible on {platform.node()}; put output on storage that all machines share"
        return replace(line, status="failed", reason=reason)
    arguments = ["-m", "rankfold.compare.trial_process", str(folder)]
    command = [*shlex.split(launch), *arguments] if launch else [sys.executable, *arguments]
    began = time.monotonic()
    with (folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # nothing is ever written to it: it ends when we do
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env=_environment(threads),
            start_new_session=True,  # Ctrl-C reaches us alone, and we end it
        )
        running = set() if running is None else running
        running.add(process)
        try:
            code = process.wait()
        finally:
            _end(process)
            running.discard(process)
    took, measured = time.monotonic() - began, folder / f"{line.id}.json"
    if measured.is_file():
        return replace(TrialLine.from_json(measured.read_text(encoding="utf-8")), wall_seconds=took)
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    reason = f"its process ended with {how}{', perhaps for lack of memory' if code == -9 else ''}; see {folder / LOG}"
    return replace(line, status="failed", reason=reason, wall_seconds=took)


def _end(process: subprocess.Popen[Any]) -> None:
    """Ends a trial and all processes it started; they all read the same standard input."""
    if process.stdin:
        process.stdin.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _environment(threads: int) -> dict[str, str]:
    given = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    # `accelerate` of this environment, also where it is not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {"TOKENIZERS_PARALLELISM": "false"} | os.environ | given | {"PATH": path}
