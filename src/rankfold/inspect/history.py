"""The ranks of a run over its steps, from the `ranks.jsonl` that `AdapterCallback` writes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rankfold.errors import RankfoldError
from rankfold.inspect.grid import Grid, grid

if TYPE_CHECKING:
    from rich.console import Group

FILE = "ranks.jsonl"


@dataclass(frozen=True)
class RankHistory:
    """Ranks over training steps.

    Args:
        name: of the run, for titles.
        steps: at which they were logged, ascending.
        ranks: by module, one for each step.
    """

    name: str
    steps: tuple[int, ...]
    ranks: dict[str, tuple[int, ...]]

    @cached_property
    def grid(self) -> Grid:
        return grid(self.ranks)

    @property
    def total(self) -> tuple[int, ...]:
        """Of all modules together."""
        return tuple(map(sum, zip(*self.ranks.values(), strict=True)))

    def by_kind(self) -> dict[str, tuple[int, ...]]:
        """Total of each kind of module, one for each step."""
        found: dict[str, list[tuple[int, ...]]] = {}
        for name, ranks in self.ranks.items():
            found.setdefault(self.grid.columns[self.grid.cells[name][1]], []).append(ranks)
        return {kind: tuple(map(sum, zip(*members, strict=True))) for kind, members in found.items()}

    def table(self, width: int = 80) -> Group:
        """For a terminal: a line over the steps for each kind of module, and the last ranks as a heat table."""
        from rankfold.inspect.terminal import show_history

        return show_history(self, width)

    def picture(self, path: str | Path) -> None:
        """The total over the steps, and a map of layers over steps for each kind; SVG, PNG or PDF by the file's ending."""
        from rankfold.inspect.pictures import draw_history

        draw_history(self, Path(path))

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "total": self.total}, indent=2) + "\n"


def find_ranks(path: str | Path) -> Path | None:
    """The ranks of a run: the file itself, or in its folder or in `checkpoints` below it."""
    path = Path(path)
    if path.is_file():
        return path
    return next((file for file in (path / FILE, path / "checkpoints" / FILE) if file.is_file()), None)


def inspect_run(folder: str | Path, *, adapter_name: str = "default") -> RankHistory:
    """Reads the ranks of a run.

    Args:
        folder: its output folder, its checkpoints, or the file itself.
        adapter_name: which adapter, if the run trained several.

    Raises:
        ValueError: no such file, an empty or damaged one, or no such adapter. A last line that is cut off is left out,
            for a run may be writing it.
    """
    path = find_ranks(folder)
    if path is None:
        raise RankfoldError(
            f"{folder} has no {FILE}: only methods whose ranks change write it, through AdapterCallback"
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    found: dict[int, dict[str, int]] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            step, adapters = int(row["step"]), dict(row["ranks"])
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise RankfoldError(f"{path}:{number}: not a line of ranks; delete it") from None
        if adapter_name not in adapters:
            raise RankfoldError(f"adapter_name={adapter_name!r}: {path} has {', '.join(sorted(adapters)) or 'none'}")
        found[step] = adapters[adapter_name]
    if not found:
        raise RankfoldError(f"{path} has no whole line yet")
    steps = sorted(found)
    modules = list(found[steps[-1]])
    for step in steps:
        if found[step].keys() != set(modules):
            raise RankfoldError(f"{path}: step {step} has other modules than step {steps[-1]}; two runs wrote into it")
    ranks = {module: tuple(int(found[step][module]) for step in steps) for module in modules}
    run = path.absolute().parent
    return RankHistory(run.parent.name if run.name == "checkpoints" else run.name, tuple(steps), ranks)
