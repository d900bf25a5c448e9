"""What is made once from a package's or a user's files, kept in `$RANKFOLD_CACHE`, or `~/.cache/rankfold`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from rankfold.io.files import sync, to_json

_MANIFEST = "rankfold-cache.json"


class MissingAssetError(FileNotFoundError):
    """A package or model that is not installed; the message says which command brings it."""


def cache_root() -> Path:
    """The folder for everything that is made once: `$RANKFOLD_CACHE`, or `~/.cache/rankfold`."""
    return Path(os.environ.get("RANKFOLD_CACHE") or "~/.cache/rankfold").expanduser()


def cached_folder(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; `build` fills it if it is not there whole.

    It appears by one rename once all of it is on the disk: what a killed build leaves is never taken for a whole one.
    Of several processes that ask at once, one builds and the others wait.

    Raises:
        OSError: the cache cannot be written.
    """
    from filelock import FileLock
    from safetensors import SafetensorError

    target = cache_root() / "models" / name
    if _is_whole(target):
        return target
    work = target.with_name(f".{name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{name}.lock")):
            if _is_whole(target):
                return target
            try:
                shutil.rmtree(
                    work, ignore_errors=True
                )  # what a killed process left: we hold the lock, so nobody writes there
                work.mkdir()
                build(work)
                sizes = {str(file.relative_to(work)): file.stat().st_size for file in work.rglob("*") if file.is_file()}
                (work / _MANIFEST).write_text(to_json(sizes, sort_keys=True))
                for entry in [*work.rglob("*"), work]:
                    sync(entry)
                shutil.rmtree(target, ignore_errors=True)  # there only if it is damaged
                work.rename(target)
                sync(target.parent)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"cannot make {target}: {error}; free some space or set RANKFOLD_CACHE to a folder that can be written"
        ) from error
    return target


def _is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _MANIFEST).read_text())
        return all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError):
        return False
