"""`rankfold fold`."""

from __future__ import annotations

from dataclasses import dataclass

from rankfold.commands.command import option, positional
from rankfold.commands.folding import FoldingOptions


@dataclass(kw_only=True)
class Options(FoldingOptions):
    """fold an adapter into a plain LoRA that any engine serves"""

    adapter: str = positional("an adapter of rankfold, PEFT, mlx-lm, diffusers, kohya or llama.cpp: its folder or file")
    base: str | None = option("base model, if not the one that the adapter names", default=None)
    calibration: str | None = option(
        'texts (.jsonl with "text", or paragraphs): compress for their outputs', default=None, metavar="FILE"
    )
    approximate: str | None = option(
        "of an adapter without an exact fold, the rule by which a LoRA comes near; --calibration measures how near",
        default=None,
        metavar="RULE",
    )
    no_probe: bool = option("do not compare outputs of the two on a probe batch", default=False)


def run(options: Options) -> int:
    from rankfold.fold import fold_adapter

    folded = fold_adapter(
        options.adapter,
        options.out,
        base=options.base,
        calibration=options.calibration,
        approximate=options.approximate,
        probe=not options.no_probe,
        **options.of_fold,
    )
    print(folded.summary())
    return 0
