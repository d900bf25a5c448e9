"""`rankfold optimizers`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import entry_points

from rankfold.catalogue import ListedOptimizer, listed_optimizers
from rankfold.commands.command import CommonOptions, option, positional
from rankfold.errors import RankfoldError, nearest


@dataclass(kw_only=True)
class Options(CommonOptions):
    """list the optimisers that know what a pair of factors is, or the options of one"""

    name: str | None = positional("whose options to list", default=None, nargs="?")
    json: bool = option("print JSON instead of the table", default=False)


def run(options: Options) -> int:
    found = _rows(options.imports)
    if options.name is not None:
        chosen = [row for row in found if row.name == options.name]
        if not chosen:
            hint = nearest(options.name, [row.name for row in found], "there are")
            raise RankfoldError(f"no optimizer is called '{options.name}'{hint}")
        return _options(chosen[0], options.json)
    if options.json:
        print(json.dumps([vars(row) for row in found], indent=2))
        return 0
    from rankfold.text import table, terminal

    listing = table("name", "optimiser", "paper", "summary")
    for row in found:
        listing.add_row(row.name, row.title, row.paper, row.summary)
    terminal().print(listing)
    print(
        "In a run file: training: {optimizer: NAME, optimizer_options: {...}}; `rankfold optimizers NAME` lists the options."
    )
    return 0


def _rows(imports: list[str]) -> list[ListedOptimizer]:
    """Ours from their source; with third parties' modules, the whole registry, which has to load them."""
    if not imports and not entry_points(group="rankfold.methods"):
        return listed_optimizers()
    from rankfold.optim.registry import rows

    return [ListedOptimizer(r.name, r.title, r.paper, r.summary) for r in rows()]


def _options(row: ListedOptimizer, as_json: bool) -> int:
    from rankfold.optim.registry import get

    found = [(o.name, o.default, o.metadata["help"]) for o in get(row.name).options() if o.name != "weight_decay"]
    if as_json:
        named = [{"name": name, "default": default, "help": help} for name, default, help in found]
        print(json.dumps({**vars(row), "options": named}, indent=2))
        return 0
    from rankfold.text import table, terminal

    listing = table("option", "default", "meaning", title=f"{row.title}: {row.summary}")
    for name, default, help in found:
        listing.add_row(name, json.dumps(default), help)
    terminal().print(listing)
    print("Learning rate and weight decay are training.learning_rate and training.weight_decay.")
    return 0
