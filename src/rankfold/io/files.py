"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_folder(path: Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends, and vanishes if the block fails.

    Args:
        path: where the folder will be.
        force: replace what is there; it is removed only when the new folder is in place.

    Raises:
        FileExistsError: `path` exists, is not an empty folder, and `force` is not given.
    """
    path = Path(path)
    if path.exists() and not force and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists; choose another folder or replace it with --force")
    old = None
    made = [parent for parent in path.parents if not parent.exists()]  # the nearest first
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        _sync(temporary)
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            os.replace(path, old / path.name)
        try:
            os.replace(temporary, path)
        except OSError:
            if old is not None:
                os.replace(old / path.name, path)
            raise
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # they are not empty where the folder appeared
            for parent in made:
                parent.rmdir()
        with suppress(OSError):  # nor is this where something was kept
            if old is not None:
                old.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(folder: Path) -> None:
    """Every file on disk before the rename, so that a power cut cannot leave a whole name over half a file."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb+") as f:
                os.fsync(f.fileno())
