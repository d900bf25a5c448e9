"""`rankfold diff`."""

from __future__ import annotations

from dataclasses import dataclass

from rankfold.commands.command import CommonOptions, option, positional


@dataclass(kw_only=True)
class Options(CommonOptions):
    """say how far two adapters, or two models, are apart, layer by layer"""

    a: str = positional("an adapter of any kind that folds, or a model's folder")
    b: str = positional("another one")
    base: str | None = option("base model of the adapters, if not the one that they name", default=None)
    json: bool = option("print JSON instead of the table", default=False)


def run(options: Options) -> int:
    from rankfold.algebra import diff

    found = diff(options.a, options.b, base=options.base)
    if options.json:
        print(found.to_json(), end="")
        return 0
    from rankfold.text import terminal

    console = terminal()
    console.print(found.table())
    for note in found.notes:
        console.print(f"note: {note}")
    return 0
