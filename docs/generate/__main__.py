"""Writes the pages of docs/reference/ that are made from the code, and the notebooks of docs/tutorials/.

PYTHONPATH=docs python -m generate             write what changed
PYTHONPATH=docs python -m generate --check     write nothing; exit 1 and name what is out of date
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from generate import commands, data_formats, engines, file_keys, memory, notebooks, registries

DOCS = Path(__file__).parents[1]

PAGES: dict[str, Callable[[], str]] = {
    "reference/run-file.md": file_keys.run_file,
    "reference/compare-file.md": file_keys.compare_file,
    "reference/commands.md": commands.commands,
    "reference/methods.md": registries.methods,
    "reference/optimisers.md": registries.optimisers,
    "reference/tasks.md": registries.tasks,
    "reference/data-formats.md": data_formats.data_formats,
    "reference/engines.md": engines.engines,
    "reference/memory.md": memory.memory,
    **{f"tutorials/{name}.ipynb": notebooks.maker(DOCS / "tutorials" / f"{name}.md") for name in notebooks.NAMES},
}


def main(check: bool) -> int:
    """Write all pages, or only say which are out of date."""
    changed = []
    for name, make in PAGES.items():
        path, text = DOCS / name, make()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        changed.append(name)
        if not check:
            path.write_text(text, encoding="utf-8")
    for name in changed:
        print(f"{'out of date' if check else 'wrote'}: docs/{name}")
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
