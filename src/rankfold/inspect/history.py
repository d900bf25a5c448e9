"""The ranks of a run over its steps, from the `ranks.jsonl` that `AdapterCallback` writes."""

from __future__ import annotations

from pathlib import Path

from rankfold.errors import RankfoldError
from rankfold.inspect.inspection import RankHistory
from rankfold.io.files import read_json_lines

FILE = "ranks.jsonl"


def find_ranks(path: str | Path) -> Path | None:
    """The ranks of a run: the .jsonl file itself, or in its folder or in `checkpoints` below it."""
    path = Path(path)
    if path.is_file() and path.suffix == ".jsonl":
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
    found: dict[int, dict[str, int]] = {}
    for number, row in read_json_lines(path):
        try:
            step, adapters = int(row["step"]), dict(row["ranks"])
        except (ValueError, KeyError, TypeError):
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
