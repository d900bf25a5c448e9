"""`rankfold init`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rankfold.commands.command import CommonOptions, option, positional
from rankfold.pages import cite
from rankfold.tasks.table import TASKS


@dataclass(kw_only=True)
class Options(CommonOptions):
    """write a commented run file that works"""

    run_file: str = positional("the file to write", default="run.yaml", nargs="?", metavar="run.yaml")
    task: str = option("what is learnt", default="classification", choices=TASKS)
    method: str = option("see `rankfold methods`, or peft:NAME", default="rasa")
    compare: bool = option("a compare file instead; its methods are a start", default=False)
    force: bool = option("replace the file if it exists", default=False)


def run(options: Options) -> int:
    from rankfold.compare.template import template as compare_template
    from rankfold.plan.starter import learning_rate
    from rankfold.runfile.imports import seen_from
    from rankfold.runfile.template import template

    path = Path(options.run_file)
    if path.exists() and not options.force:
        raise FileExistsError(f"'{path}' exists; give another name or --force")
    rate = None if options.compare else learning_rate(options.task, options.method)
    text = (
        compare_template(options.task)
        if options.compare
        else template(options.task, options.method, seen_from(options.imports, path), rate)
    )
    path.write_text(text, encoding="utf-8")
    if rate is not None:
        print(
            f"training.learning_rate is {rate:g}, a first rate for this method and scale ({cite('comparing')}); tune it"
        )
    print(f"wrote {path}; next: rankfold {'compare' if options.compare else 'train'} {path} --dry-run")
    return 0
