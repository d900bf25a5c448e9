"""`rankfold validate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rankfold.commands.command import RunFileOptions


@dataclass(kw_only=True)
class Options(RunFileOptions):
    """check a run file, or a file for compare or continual"""


def run(options: Options) -> int:
    from rankfold.runfile.load import command_of, load, read_values

    path = options.run_file
    values, _ = read_values(Path(path), f"no run file '{path}': `rankfold init {path}` writes one")
    match command_of(values):
        case "compare":
            from rankfold.compare.file import load as load_compare

            compared = load_compare(path, options.overrides)
            what, goes = (
                f"{len(compared.methods)} contenders on {compared.model.name} for {compared.task}",
                compared.output,
            )
        case "continual":
            from rankfold.continual.file import load as load_continual

            tasks = load_continual(path, options.overrides)
            count = len(tasks.tasks) if tasks.tasks else tasks.split.parts if tasks.split else 0
            what, goes = f"{tasks.method.name} on {tasks.model.name} for {count} tasks of {tasks.task}", tasks.output
        case _:
            run = load(path, options.overrides)
            what, goes = f"{run.method.name} on {run.model.name} for {run.task}", run.output
    print(f"{path} is valid: {what}, into {goes}")
    return 0
