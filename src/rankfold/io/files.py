"""Files and folders that appear whole or not at all, JSON that is always valid, and JSON lines that survive a kill."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rankfold.errors import RankfoldError


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
        for file in temporary.rglob("*"):
            if file.is_file() and not file.is_symlink():
                os.chmod(file, 0o666 & ~_umask())  # safetensors makes its files for their owner alone
                sync(file)
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


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, whose file takes its place when the block ends; a failed block leaves `path` as it was."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that a crash or a full disk leaves as it was before, never half."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def to_json(value: Any, **options: Any) -> str:
    """Valid JSON, of two spaces per level unless `options` of `json.dumps` say otherwise; ends with a line break.

    Raises:
        RankfoldError: NaN or infinity in it, which JSON does not have.
    """
    try:
        return json.dumps(value, allow_nan=False, **{"indent": 2, **options}) + "\n"
    except ValueError as error:
        raise RankfoldError(f"NaN or infinity cannot be written as JSON ({error}); the values have diverged") from None


def read_json_lines(path: Path, *, skip_damaged: bool = False) -> list[tuple[int, Any]]:
    """The rows of a JSONL file with their line numbers; no file is no rows.

    A last line without its line break may be cut off, because a kill can interrupt the writing; it is left out then.

    Args:
        skip_damaged: leave out other lines that are not JSON as well.

    Raises:
        RankfoldError: a line that is not JSON, by its number.
    """
    found: list[tuple[int, Any]] = []
    # Not splitlines(), which also splits at U+2028 and its kind, and JSON may hold those
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append((number, json.loads(line)))
        except ValueError as error:
            if number == len(lines):
                break
            if not skip_damaged:
                raise RankfoldError(f"{path}:{number}: not a JSON line ({error}); delete the line") from None
    return found


def append_line(path: Path, line: str) -> None:
    """Adds a line that is on the disk when this returns; half a line that a kill left before it is cut off.

    A last line that is whole and lacks its line break, as some editors leave it, was read and stays.
    """
    with Path(path).open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                content = file.read()
                last = content.rpartition(b"\n")[2]
                if _is_json(last):
                    file.write(b"\n")
                else:
                    file.truncate(len(content) - len(last))
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def sha256(path: Path) -> str:
    """Of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Puts a file or a folder's entries on the disk, so that a power cut after a rename cannot leave half of it."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    descriptor = os.open(
        path, os.O_RDWR if os.name == "nt" else os.O_RDONLY
    )  # there only what may be written is flushed
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
