"""`rankfold continual`."""

from __future__ import annotations

from dataclasses import dataclass

from rankfold.commands.command import RunFileOptions, option
from rankfold.commands.terminal import command_line, print_table

INTERRUPTED = "interrupted; the same command goes on where this one stopped"


@dataclass(kw_only=True)
class Options(RunFileOptions):
    """learn tasks in a row and measure what is forgotten; a killed run goes on"""

    dry_run: bool = option("print the tasks and the plan of the first one; train nothing", default=False)


def run(options: Options) -> int:
    from rankfold.continual.file import load

    file = load(options.run_file, options.overrides)
    if options.dry_run:
        from rankfold.continual.task_list import resolve
        from rankfold.train.prepare import make_plan, prepare

        tasks = resolve(file)
        plan = make_plan(prepare(file.run_file(0, tasks[0].data)))
        print_table("plan of the first task (nothing was trained)", plan.lines())
        print_table("tasks", [(str(i), task.words()) for i, task in enumerate(tasks, 1)])
        print(f"next_task: {file.rule}", *plan.notes, sep="\n")
        return 0
    from rankfold.continual.run import continual
    from rankfold.text import terminal

    result = continual(file, command=command_line())
    terminal().print(result.table())
    print_table(result.output, result.lines())
    print(*result.notes, sep="\n")
    return 0
