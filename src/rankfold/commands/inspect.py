"""`rankfold inspect`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rankfold.commands.command import CommonOptions, option, positional
from rankfold.errors import RankfoldError

if TYPE_CHECKING:
    from rankfold.inspect.inspection import Inspection, RankHistory


@dataclass(kw_only=True)
class Options(CommonOptions):
    """show rank, norm and spectrum of an adapter, or ranks over a run's steps"""

    path: str = positional("an adapter folder, a run's folder, or a ranks.jsonl")
    picture: str | None = option("SVG, PNG or PDF heat map", default=None)
    json: bool = option("print JSON instead of the table", default=False)
    base: str | None = option("base model, if not the one that the adapter names", default=None)
    adapter_name: str = option("which adapter's ranks of a run", default="default")
    force: bool = option("replace pictures that exist", default=False)


def run(options: Options) -> int:
    """Prints what is in an adapter folder, in a run's folder (its ranks over the steps, and its adapter if there is one),
    or in a ranks.jsonl; and draws it. For a run with both, the picture of the ranks goes to NAME-ranks beside the other; the links of
    a chain go to NAME-links.
    As JSON it is {"adapter": ..., "run": ...}.

    Raises:
        RankfoldError: what cannot be looked at, and why.
        FileExistsError: without `force`.
    """
    from rankfold.inspect.pictures import check_picture

    if not Path(options.path).exists():
        raise FileNotFoundError(
            f"'{options.path}' does not exist; give an adapter folder, a run's folder or a ranks.jsonl"
        )
    adapter, history = _look(options)
    pictures = _pictures(options.picture, adapter, history)
    for file in pictures:
        check_picture(file)
        if file.exists() and not options.force:
            raise FileExistsError(f"'{file}' exists; give another name or --force")
        file.parent.mkdir(parents=True, exist_ok=True)
    for file, draw in pictures.items():
        draw(file)
    if options.json:
        found = {"adapter": adapter, "run": history}
        print(json.dumps({key: json.loads(one.to_json()) for key, one in found.items() if one}, indent=2))
        return 0
    from rankfold.inspect.terminal import show_adapter, show_history
    from rankfold.text import terminal

    console = terminal()
    if history:
        console.print(show_history(history, console.width))
    if adapter:
        console.print(show_adapter(adapter, console.width))
    for file in pictures:
        print(f"wrote {file}")
    return 0


def _look(options: Options) -> tuple[Inspection | None, RankHistory | None]:
    from rankfold.inspect.adapter import inspect_adapter
    from rankfold.inspect.history import find_ranks, inspect_run
    from rankfold.io.adapters import CONFIG
    from rankfold.io.formats import is_adapter

    path = Path(options.path)
    adapted = is_adapter(path)
    ranks = find_ranks(path.parent if adapted and path.is_file() else path)
    if not adapted and ranks is None:
        raise RankfoldError(
            f"'{path}' is neither an adapter (no {CONFIG} in it, beside it or in adapter/) nor a run that logged ranks "
            "(no ranks.jsonl in it or in checkpoints/)"
        )
    adapter = inspect_adapter(path, base=options.base) if adapted else None
    return adapter, inspect_run(ranks, adapter_name=options.adapter_name) if ranks else None


def _pictures(
    picture: str | None, adapter: Inspection | None, history: RankHistory | None
) -> dict[Path, Callable[[Path], None]]:
    """The files, and what draws each."""
    from rankfold.inspect.pictures import draw_adapter, draw_history, draw_links

    path = Path(picture or "")
    found: dict[Path, Callable[[Path], None]] = {}
    if picture and adapter:
        found[path] = partial(draw_adapter, adapter)
        if adapter.links:
            found[path.with_stem(f"{path.stem}-links")] = partial(draw_links, adapter)
    if picture and history:
        found[path.with_stem(f"{path.stem}-ranks") if adapter else path] = partial(draw_history, history)
    return found
