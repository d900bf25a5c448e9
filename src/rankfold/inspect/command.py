"""`rankfold inspect`: what the command line calls once it has parsed."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path

from rankfold.errors import RankfoldError
from rankfold.inspect.adapter import inspect_adapter
from rankfold.inspect.history import find_ranks, inspect_run
from rankfold.inspect.inspection import Inspection, RankHistory
from rankfold.inspect.pictures import check_picture, draw_adapter, draw_history
from rankfold.io.adapters import CONFIG, find_adapter


def run_inspect(
    path: str,
    *,
    picture: str | None = None,
    json: bool = False,
    base: str | None = None,
    adapter_name: str = "default",
    force: bool = False,
) -> None:
    """Prints what is in an adapter folder, in a run's folder (its ranks over the steps, and its adapter if there is one),
    or in a ranks.jsonl; and draws it.

    Args:
        picture: SVG, PNG or PDF. For a run with both, the ranks over the steps go to NAME-ranks beside it.
        json: print JSON instead: {"adapter": ..., "run": ...}.
        base: the base model of the adapter, if it has moved.
        force: replace pictures that exist.

    Raises:
        ValueError: what cannot be looked at, and why.
        FileExistsError: without `force`.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"'{path}' does not exist; give an adapter folder, a run's folder or a ranks.jsonl")
    adapter, history = _look(Path(path), base, adapter_name)
    files = _pictures(picture, adapter, history)
    for file in files:
        check_picture(file)
        if file.exists() and not force:
            raise FileExistsError(f"'{file}' exists; give another name or --force")
        file.parent.mkdir(parents=True, exist_ok=True)
    if history and files:
        draw_history(history, files[-1])
    if adapter and files:
        draw_adapter(adapter, files[0])
    if json:
        found = {"adapter": adapter, "run": history}
        print(jsonlib.dumps({key: jsonlib.loads(one.to_json()) for key, one in found.items() if one}, indent=2))
        return
    from rich.console import Console

    from rankfold.inspect.terminal import show_adapter, show_history

    console = Console()
    if history:
        console.print(show_history(history, console.width))
    if adapter:
        console.print(show_adapter(adapter, console.width))
    for file in files:
        print(f"wrote {file}")


def _look(path: Path, base: str | None, adapter_name: str) -> tuple[Inspection | None, RankHistory | None]:
    folder = find_adapter(path)
    folder = folder if (folder / CONFIG).is_file() else None
    ranks = find_ranks(folder if folder and path.is_file() else path)
    if folder is None and ranks is None:
        raise RankfoldError(
            f"'{path}' is neither an adapter (no {CONFIG} in it, beside it or in adapter/) nor a run that logged ranks "
            "(no ranks.jsonl in it or in checkpoints/)"
        )
    adapter = inspect_adapter(folder, base=base) if folder else None
    return adapter, inspect_run(ranks, adapter_name=adapter_name) if ranks else None


def _pictures(picture: str | None, adapter: Inspection | None, history: RankHistory | None) -> list[Path]:
    """The heat map's, then the history's."""
    if picture is None:
        return []
    path = Path(picture)
    return [path, path.with_stem(f"{path.stem}-ranks")] if adapter and history else [path]
