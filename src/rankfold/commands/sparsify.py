"""`rankfold sparsify`: SoRA's schedule of thresholds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rankfold.commands.command import RunFileOptions, option

INTERRUPTED = "interrupted; `rankfold sparsify ... --resume` goes on where it stopped"


@dataclass(kw_only=True)
class Options(RunFileOptions):
    """train SoRA with ever higher thresholds and draw what each of them leaves"""

    first: float = option("the first stage's threshold; 0 is dense", default=0.0)
    last: float = option("the last stage's threshold")
    stages: int = option("how many, the first and last included", default=6)
    schedule: Literal["linear", "log_linear", "exp_linear"] = option("how the thresholds rise", default="linear")
    stage_epochs: float | None = option("of every stage after the first (default: as the first)", default=None)
    resume: bool = option("go on where a killed schedule stopped", default=False)
    overwrite: bool = option("delete earlier stages in the output folder first", default=False)


def run(options: Options) -> int:
    from rankfold.runfile.load import load
    from rankfold.train.sparsify import sparsify, thresholds

    schedule = thresholds(options.first, options.last, options.stages, options.schedule)
    stages = sparsify(
        load(options.run_file, options.overrides),
        schedule,
        stage_epochs=options.stage_epochs,
        resume=options.resume,
        overwrite=options.overwrite,
    )
    print(f"{len(stages)} adapters; the curve is in {Path(stages[0].adapter).parent.parent / 'stages.png'}")
    return 0
