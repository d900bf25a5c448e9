"""`rankfold validate`."""

from __future__ import annotations

from dataclasses import dataclass

from rankfold.commands.command import RunFileOptions


@dataclass(kw_only=True)
class Options(RunFileOptions):
    """check a run file"""


def run(options: Options) -> int:
    from rankfold.runfile.load import load

    run = load(options.run_file, options.overrides)
    print(f"{options.run_file} is valid: {run.method.name} on {run.model.name} for {run.task}, into {run.output}")
    return 0
