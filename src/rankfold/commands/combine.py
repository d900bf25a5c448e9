"""`rankfold combine`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rankfold.commands.command import option, positional
from rankfold.commands.folding import FoldingOptions


@dataclass(kw_only=True)
class Options(FoldingOptions):
    """add up adapters of any kind into one plain LoRA, exactly"""

    adapters: list[str] = positional("folders or files of adapters, as in fold", nargs="+", metavar="adapter")
    weights: list[float] = option("one per adapter, of any sign", nargs="+", type=float, metavar="W")
    base: str | None = option("base model of all of them, where they name different ones", default=None)
    combination: Literal["sum", "ties", "dare_linear", "dare_ties"] = option(
        "sum: exact; the others keep some entries of each update and need --density, and --rank or --error",
        default="sum",
    )
    density: float | None = option("share of the entries that ties and dare keep", default=None, metavar="D")
    seed: int = option("of the entries that dare keeps", default=0)


def run(options: Options) -> int:
    from rankfold.algebra import combine

    report = combine(
        options.adapters,
        options.out,
        weights=options.weights,
        combination=options.combination,
        density=options.density,
        seed=options.seed,
        base=options.base,
        **options.of_fold,
    )
    print(report.summary())
    return 0
