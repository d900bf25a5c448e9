"""An environment of its own for each engine, in the cache, made once from its pinned requirements.

Made whole or not at all, and anew where the requirements or the interpreter are others than those it was made from.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from rankfold.io.cache import cache_root

HERE = Path(__file__).parent
STAMP = "rankfold-made-from.txt"


class Unavailable(Exception):
    """An engine that cannot be had here; the message says why."""


def requirements(name: str) -> Path:
    return HERE / "requirements" / f"{name}.txt"


def existing(name: str) -> Path | None:
    """The interpreter of an engine's environment, if it was made from these requirements."""
    folder = cache_root() / "engines" / name
    try:
        whole = (folder / STAMP).read_text(encoding="utf-8") == _made_from(name)
    except OSError:
        return None
    return folder / "bin" / "python" if whole else None


def environment(name: str) -> Path:
    """The interpreter of an engine's environment, which is made if it is not there.

    Raises:
        Unavailable: pip cannot install it here.
    """
    if python := existing(name):
        return python
    folder = cache_root() / "engines" / name
    print(f"making the environment of {name} in {folder}, once", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    python = folder / "bin" / "python"
    _run([sys.executable, "-m", "venv", str(folder)], f"no virtual environment in {folder}")
    install = [str(python), "-m", "pip", "install", "-q", "--no-deps", "--only-binary", ":all:"]
    _run([*install, "-r", str(requirements(name))], f"pip cannot install {requirements(name).name}")
    (folder / STAMP).write_text(_made_from(name), encoding="utf-8")
    return python


def _made_from(name: str) -> str:
    return f"{sys.version}\n{requirements(name).read_text(encoding='utf-8')}"


def _run(command: list[str], failure: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise Unavailable(f"{failure}: {(lines or ['no message'])[0]}")
