"""A progress bar for what takes more than a second, on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
#: Shorter work needs no bar.
PATIENCE = 1.0


def watched(items: Sequence[T], show: bool, text: str) -> Iterator[T]:
    """Yields the items; with `show`, on a terminal and beyond a second, a bar tells how far it is."""
    if not (show and sys.stderr.isatty()):
        yield from items
        return
    from rich.console import Console
    from rich.progress import Progress

    begin, bar, task = time.monotonic(), None, None
    try:
        for i, item in enumerate(items):
            if bar is None and time.monotonic() - begin > PATIENCE:
                bar = Progress(console=Console(stderr=True), transient=True)
                bar.start()
                task = bar.add_task(text, total=len(items))
            if bar is not None and task is not None:
                bar.update(task, completed=i)
            yield item
    finally:
        if bar is not None:
            bar.stop()
