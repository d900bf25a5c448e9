"""`rankfold extract`."""

from __future__ import annotations

from dataclasses import dataclass

from rankfold.commands.command import positional
from rankfold.commands.folding import FoldingOptions


@dataclass(kw_only=True)
class Options(FoldingOptions):
    """make a plain LoRA out of a full fine-tune"""

    base: str = positional("the model before: a folder, or a hub id in the local cache")
    tuned: str = positional("the model after")


def run(options: Options) -> int:
    from rankfold.algebra import extract

    print(extract(options.base, options.tuned, options.out, **options.of_fold).summary())
    return 0
