"""`rankfold doctor`: what the command line calls once it has parsed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rankfold.doctor.diagnosis import diagnose
from rankfold.doctor.engines import ENGINES
from rankfold.doctor.fix import fix


def run_doctor(
    path: str, *, base: str | None = None, engines: Sequence[str] = (), json: bool = False, fixed: str | None = None
) -> int:
    """Prints a diagnosis.

    Args:
        engines: ask these alone; then each of them must load the adapter.
        fixed: write a mended copy there first, and examine that.
        json: print JSON instead of the table.

    Returns:
        0 if the file is sound and every engine loads it right, else 1.

    Raises:
        ValueError, OSError: as `diagnose`.
    """
    done = fix(path, fixed) if fixed else []
    found = diagnose(fixed or path, base, engines)
    if json:
        print(found.to_json(), end="")
    else:
        from rich.console import Console

        from rankfold.doctor.show import show

        for sentence in done:
            print(f"mended: {sentence}")
        Console().print(show(found))
    return 0 if found.healthy else 1


def engine_list(text: str) -> list[str]:
    """Engines from "vllm,sglang"; a wrong one is wrong usage."""
    keys = [e.key for e in ENGINES]
    names = [n.strip().lower() for n in text.split(",") if n.strip()]
    wrong = [n for n in names if n not in keys]
    if wrong or not names:
        raise argparse.ArgumentTypeError(f"{', '.join(wrong) or 'nothing'}: must be of {', '.join(keys)}")
    return names
