"""`rankfold train`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from rankfold.commands.command import RunFileOptions, option
from rankfold.commands.terminal import command_line, print_table

INTERRUPTED = "interrupted; `rankfold train ... --resume` continues from the last checkpoint"


@dataclass(kw_only=True)
class Options(RunFileOptions):
    """train an adapter as a run file says"""

    dry_run: bool = option("print parameters, steps and memory; train nothing", default=False)
    resume: bool = option("continue from the last whole checkpoint, if there is one", default=False)
    profile: bool = option("write where the time of a few steps went: profile.txt", default=False)
    overwrite: bool = option("delete the earlier run in the output folder first", default=False)


def run(options: Options) -> int:
    from rankfold.runfile.load import load

    run = load(options.run_file, options.overrides)
    if options.dry_run:
        from rankfold.train.prepare import make_plan, prepare

        plan = make_plan(prepare(run))
        print_table("plan (nothing was trained or written)", plan.lines())
        print(*plan.notes, sep="\n")
        return 0
    from rankfold.train.profiler import Profile
    from rankfold.train.run import train

    extra = [Profile(Path(run.output))] if options.profile else []
    result = train(run, resume=options.resume, overwrite=options.overwrite, command=command_line(), callbacks=extra)
    if int(os.environ.get("RANK", 0)) == 0:
        print_table(result.output, result.lines())
    return 0
