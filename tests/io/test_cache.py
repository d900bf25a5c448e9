"""The cache never hands out half of anything. Processes that a test starts import this file, so it imports nothing heavy."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rankfold.io.cache import cached_folder


def _build(folder: Path) -> None:
    (folder / "weights").write_bytes(b"w" * 1000)
    (folder / "deep").mkdir()
    (folder / "deep" / "config").write_text("{}")


def _build_slowly(folder: Path) -> None:
    (folder / "weights").write_bytes(b"w")
    (folder.parent.parent / "building").touch()
    time.sleep(600)


def test_a_killed_build_is_never_used(cache: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=cached_folder, args=("thing", _build_slowly))
    process.start()
    while not (cache / "building").exists():
        assert process.is_alive()
        time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (cache / "models" / ".thing.partial" / "weights").exists()
    assert not (cache / "models" / "thing").exists()

    folder = cached_folder("thing", _build)
    assert (folder / "weights").stat().st_size == 1000
    assert not (cache / "models" / ".thing.partial").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "weights").unlink(),
        lambda folder: (folder / "weights").write_bytes(b"w" * 10),
        lambda folder: (folder / "rankfold-cache.json").unlink(),
        lambda folder: (folder / "rankfold-cache.json").write_text('{"weights"'),
    ],
    ids=["file lost", "file cut short", "no manifest", "manifest cut short"],
)
def test_a_damaged_folder_is_built_again(cache: Path, damage: Callable[[Path], object]) -> None:
    folder = cached_folder("thing", _build)
    damage(folder)
    assert cached_folder("thing", _build) == folder
    assert (folder / "weights").stat().st_size == 1000


def test_a_whole_folder_is_not_built_again(cache: Path) -> None:
    folder = cached_folder("thing", _build)

    def never(folder: Path) -> None:
        raise AssertionError

    assert cached_folder("thing", never) == folder


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bad weights")])
def test_a_failed_build_leaves_nothing(cache: Path, error: BaseException) -> None:
    def build(folder: Path) -> None:
        _build(folder)
        raise error

    with pytest.raises(type(error)):
        cached_folder("thing", build)
    assert [path.name for path in (cache / "models").iterdir()] == [".thing.lock"]


def test_a_full_disk_is_said(cache: Path) -> None:
    def build(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"cannot make .*thing: .*No space left.*RANKFOLD_CACHE"):
        cached_folder("thing", build)


def test_a_cache_that_is_a_file_is_said(cache: Path) -> None:
    cache.write_text("")
    with pytest.raises(OSError, match="RANKFOLD_CACHE"):
        cached_folder("thing", _build)


def _build_counting(folder: Path) -> None:
    with (folder.parent.parent / "builds").open("a") as file:
        file.write("x")
    time.sleep(0.5)
    _build(folder)


def test_processes_that_ask_at_once_build_once(cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=cached_folder, args=("thing", _build_counting)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (cache / "builds").read_text() == "x"
    assert (cache / "models" / "thing" / "weights").stat().st_size == 1000
