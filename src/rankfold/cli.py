"""The command line: parse, call, print. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rankfold.errors import RankfoldError
from rankfold.io.paths import with_home
from rankfold.tasks.table import TASKS


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0, or 1 for an error of the user's, which is one clear sentence on stderr. Wrong usage exits with 2.
    """
    arguments = _parser().parse_args(argv)
    for name, value in vars(arguments).items():
        if isinstance(value, str | list):
            setattr(arguments, name, with_home(value))
    try:
        if arguments.imports:
            from rankfold.host.plugins import load_plugin

            for name in arguments.imports:
                load_plugin(name)
        return arguments.call(arguments) or 0
    except KeyboardInterrupt:
        print("\ninterrupted; `rankfold train ... --resume` continues from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as e:
        if arguments.debug or not _is_users(e):
            raise
        print(f"error: {_missing_extra(e) or e}", file=sys.stderr)
        return 1


def _is_users(error: Exception) -> bool:
    """Ours and the libraries' complaints about input and machine; anything else is a bug and shows its traceback."""
    if isinstance(error, RankfoldError | OSError | ImportError):
        return True
    return type(error).__name__ in ("OutOfMemoryError", "SafetensorError")


def _missing_extra(error: Exception) -> str | None:
    extra = {"pydantic", "yaml", "trl", "datasets", "matplotlib", "sklearn", "jinja2"}
    if isinstance(error, ModuleNotFoundError) and error.name in extra:
        return f"training needs the package '{error.name}': pip install 'rankfold[train]'"
    return None


# --- commands -----------------------------------------------------------------------------------------------------------


def _train(a: argparse.Namespace) -> None:
    if not a.debug:
        _quiet()
    from rankfold.runfile.load import load

    run = load(a.run_file, a.overrides)
    if a.dry_run:
        from rankfold.train.prepare import make_plan, prepare

        plan = make_plan(prepare(run))
        _print_table("plan (nothing was trained)", plan.lines())
        print(*plan.notes, sep="\n")
        return
    from rankfold.train.profiler import Profile
    from rankfold.train.run import train

    extra = [Profile(Path(run.output))] if a.profile else []
    result = train(run, resume=a.resume, overwrite=a.overwrite, command=_command_line(), callbacks=extra)
    if int(os.environ.get("RANK", 0)) == 0:
        _print_table(result.output, result.lines())


def _sparsify(a: argparse.Namespace) -> None:
    if not a.debug:
        _quiet()
    from rankfold.runfile.load import load
    from rankfold.train.sparsify import sparsify, thresholds

    schedule = thresholds(a.first, a.last, a.stages, a.schedule)
    stages = sparsify(
        load(a.run_file, a.overrides), schedule, stage_epochs=a.stage_epochs, resume=a.resume, overwrite=a.overwrite
    )
    print(f"{len(stages)} adapters; the curve is in {Path(stages[0].adapter).parent.parent / 'stages.png'}")


def _compare(a: argparse.Namespace) -> int:
    _quiet()
    from rankfold.compare.command import run_compare
    from rankfold.compare.file import load

    options = {"workers": a.workers, "kind": a.executor, "retry_failed": a.retry_failed}
    try:
        run_compare(
            load(a.compare_file, a.overrides),
            dry_run=a.dry_run,
            report_only=a.report_only,
            command=_command_line(),
            **options,
        )
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    return 0


def _validate(a: argparse.Namespace) -> None:
    from rankfold.runfile.load import load

    run = load(a.run_file, a.overrides)
    print(f"{a.run_file} is valid: {run.method.name} on {run.model.name} for {run.task}, into {run.output}")


def _init(a: argparse.Namespace) -> None:
    from rankfold.compare.template import template as compare_template
    from rankfold.runfile.imports import seen_from
    from rankfold.runfile.template import template

    path = Path(a.run_file)
    if path.exists() and not a.force:
        raise FileExistsError(f"'{path}' exists; give another name or --force")
    path.write_text(
        compare_template(a.task) if a.compare else template(a.task, a.method, seen_from(a.imports, path)),
        encoding="utf-8",
    )
    print(f"wrote {path}; next: rankfold {'compare' if a.compare else 'train'} {path} --dry-run")


def _methods(a: argparse.Namespace) -> int:
    from rankfold.host import registry

    found = registry.find(a.pattern)
    if a.json:
        keys = ("name", "title", "paper", "summary", "foldable")
        rows = [{**{key: getattr(m, key) for key in keys}, "config": m.config.__name__} for m in found]
        print(json.dumps(rows, indent=2))
    elif found:
        from rich.console import Console
        from rich.table import Table

        table = Table("name", "method", "paper", "folds", "summary", box=None, pad_edge=False, header_style="bold")
        for m in found:
            table.add_row(m.name, m.title, m.paper, "exactly" if m.foldable else "no", m.summary)
        Console().print(table)
    if not found:
        print(f"error: no method matches '{a.pattern}'; `rankfold methods` lists them all", file=sys.stderr)
    return 0 if found else 1


def _fold(a: argparse.Namespace) -> None:
    import warnings

    from rankfold.fold import fold_adapter

    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers' renamings concern nobody here

    given = ("base", "profile", "dtype", "pad", "rank", "error", "calibration", "strict", "force")
    options = {name: getattr(a, name) for name in given}
    folded = fold_adapter(Path(a.adapter), Path(a.out), **options, probe=not a.no_probe, progress=True)
    print(folded.summary())


def _doctor(a: argparse.Namespace) -> int:
    from rankfold.doctor.command import run_doctor

    return run_doctor(a.path, base=a.base, engines=[e for part in a.engines or () for e in part], json=a.json)


def _engines(text: str) -> list[str]:
    from rankfold.doctor.command import engine_list

    return engine_list(text)


def _plan(a: argparse.Namespace) -> None:
    _quiet()
    gelora = {n: v for n in _OF_GELORA if (v := getattr(a, n)) is not None}
    if a.method == ["gelora"]:
        from rankfold.gelora.command import run_gelora

        if foreign := [n for n in _OF_COSTS if getattr(a, n) is not None]:
            raise RankfoldError(f"--{foreign[0].replace('_', '-')} is not of --method gelora; leave one of the two out")
        if a.data is None:
            raise RankfoldError("--method gelora measures your texts: give --data (as data.source in a run file)")
        run_gelora(a.model, targets=a.targets, json=a.json, force=a.force, **gelora)
        return
    if gelora or a.force:
        first = next(iter(gelora), "force").replace("_", "-")
        raise RankfoldError(
            f"--{first} is of --method gelora, which chooses ranks from your texts; add it, or leave this out"
        )
    from rankfold.plan.costs import run_costs

    costs = {n: v for n in _OF_COSTS if (v := getattr(a, n)) is not None}
    run_costs(a.model, methods=a.method, targets=a.targets, json=a.json, **costs)


_OF_GELORA = ("data", "points", "seed", "rounding", "max_rank", "max_length", "text", "pair", "out", "picture")
_OF_COSTS = ("task", "r", "budget", "budget_of", "labels", "revision")


def _inspect(a: argparse.Namespace) -> None:
    _quiet()
    from rankfold.inspect.command import run_inspect

    run_inspect(a.path, picture=a.picture, json=a.json, base=a.base, adapter_name=a.adapter_name, force=a.force)


def _subspace(a: argparse.Namespace) -> None:
    from rankfold.methods.cora_subspace import build_subspace

    targets = {"targets": a.targets} if a.targets else {}
    found = build_subspace(
        a.models,
        a.out,
        base=a.base,
        scope=a.scope,
        source=a.source,
        rank=a.rank,
        scale=a.scale,
        force=a.force,
        say=print,
        **targets,
    )
    print(found.summary())


def _version(a: argparse.Namespace) -> None:
    from importlib.metadata import PackageNotFoundError, version

    print(f"python {sys.version.split()[0]}")
    for package in ("rankfold", "peft", "transformers", "trl", "torch", "accelerate", "datasets", "safetensors"):
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} (not installed)")


def _names(text: str) -> list[str]:
    """What a list is on the command line: `query,key,value`."""
    return [name.strip() for name in text.split(",") if name.strip()]


# --- parsing ------------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rankfold", description="Train low-rank adapters beyond LoRA and fold them into a plain LoRA."
    )
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, call: object, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.add_argument(
            "--import",
            dest="imports",
            action="append",
            default=[],
            metavar="MODULE",
            help="a module or file (./my_method.py) that registers a method of yours (repeatable)",
        )
        sub.set_defaults(call=call)
        return sub

    def run_file(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("run_file", metavar="run.yaml")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="for instance training.seed=1")

    train = command("train", _train, "train an adapter as a run file says")
    run_file(train)
    train.add_argument("--dry-run", action="store_true", help="print parameters, steps and memory; train nothing")
    train.add_argument("--resume", action="store_true", help="continue from the last whole checkpoint, if there is one")
    train.add_argument("--profile", action="store_true", help="write where the time of a few steps went: profile.txt")
    train.add_argument("--overwrite", action="store_true", help="delete the earlier run in the output folder first")

    sparsify = command(
        "sparsify", _sparsify, "train SoRA with ever higher thresholds and draw what each of them leaves"
    )
    run_file(sparsify)
    sparsify.add_argument("--first", type=float, default=0.0, help="the first stage's threshold (default: 0, dense)")
    sparsify.add_argument("--last", type=float, required=True, help="the last stage's threshold")
    sparsify.add_argument("--stages", type=int, default=6, help="how many, the first and last included (default: 6)")
    sparsify.add_argument("--schedule", choices=("linear", "log_linear", "exp_linear"), default="linear")
    sparsify.add_argument("--stage-epochs", type=float, help="of every stage after the first (default: as the first)")
    sparsify.add_argument("--resume", action="store_true", help="go on where a killed schedule stopped")
    sparsify.add_argument("--overwrite", action="store_true", help="delete earlier stages in the output folder first")

    compare = command("compare", _compare, "find out which method is best on your model and data, at one budget")
    compare.add_argument("compare_file", metavar="compare.yaml")
    compare.add_argument("overrides", nargs="*", metavar="key=value", help="for instance seeds=[0,1]")
    compare.add_argument(
        "--dry-run", action="store_true", help="print contenders, parameters and trials; train nothing"
    )
    compare.add_argument("--workers", type=int, default=1, help="trials at a time, which share the cores (default: 1)")
    compare.add_argument("--executor", choices=("local", "ray"), default="local", help="where trials run")
    compare.add_argument("--retry-failed", action="store_true", help="try failed trials again")
    compare.add_argument("--report-only", action="store_true", help="write the report of the trials that are there")

    run_file(command("validate", _validate, "check a run file"))

    init = command("init", _init, "write a commented run file that works")
    init.add_argument("run_file", nargs="?", default="run.yaml", metavar="run.yaml")
    init.add_argument("--task", choices=TASKS, default="classification")
    init.add_argument("--method", default="rasa", help="see `rankfold methods`, or peft:NAME (default: rasa)")
    init.add_argument("--compare", action="store_true", help="a compare file instead; its methods are a start")
    init.add_argument("--force", action="store_true", help="replace the file if it exists")

    methods = command("methods", _methods, "list the methods")
    methods.add_argument("pattern", nargs="?", default="*", help="a name with wildcards, such as 'ra*'")
    methods.add_argument("--json", action="store_true")

    fold = command("fold", _fold, "fold an adapter into a plain LoRA that any engine serves")
    fold.add_argument("adapter", help="folder of the adapter")
    fold.add_argument("-o", "--out", required=True, help="folder to write")
    fold.add_argument("--base", help="base model, if not the one that the adapter names")
    fold.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the folded weights; by default the base model's"
    )
    fold.add_argument(
        "--pad", choices=("serve", "none"), default="serve", help="serve: pad the rank to the next that engines name"
    )
    fold.add_argument("--rank", type=int, metavar="N", help="compress to at most this rank, as well as any can")
    fold.add_argument(
        "--error", type=float, metavar="E", help="compress to the least rank within this relative error, such as 0.01"
    )
    fold.add_argument(
        "--calibration", metavar="FILE", help='texts (.jsonl with "text", or paragraphs): compress for their outputs'
    )
    fold.add_argument(
        "--strict",
        type=float,
        nargs="?",
        const=1e-2,
        metavar="E",
        help="fail, and write nothing, where a module's relative error exceeds this (--strict=E; 0.01 if none is given)",
    )
    fold.add_argument(
        "--profile",
        choices=("uniform", "compact", "gguf", "mlx", "merged"),
        default="uniform",
        help="uniform: for every engine; compact: a rank for each module; gguf: llama.cpp; mlx: mlx-lm; merged: a whole model",
    )
    fold.add_argument("--no-probe", action="store_true", help="do not compare outputs of the two on a probe batch")
    fold.add_argument("--force", action="store_true", help="replace the output folder if it exists")

    doctor = command("doctor", _doctor, "say which engine loads an adapter, which refuses or mis-scales it, and why")
    doctor.add_argument("path", help="any adapter: a folder, or a .safetensors or .gguf file")
    doctor.add_argument("--base", help="folder of the base model, if not the one that the adapter names")
    doctor.add_argument(
        "--engine",
        action="append",
        dest="engines",
        type=_engines,
        metavar="NAMES",
        help="ask these alone, and fail unless each loads it: vllm,sglang,llama.cpp,... (repeatable)",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of the table")

    plan = command("plan", _plan, "say what each method costs on a model, as it is or at one budget; loads no weights")
    plan.add_argument("--model", required=True, help="a folder with a config.json, GGUF file, bundled name or hub id")
    plan.add_argument(
        "--method",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="these alone, as in rasa, peft:dora or lora:r=4,use_rslora=true, with their part of a run file; "
        "gelora: see below",
    )
    plan.add_argument(
        "--targets", type=_names, metavar="A,B", help="ends of module names (default: every linear layer)"
    )
    plan.add_argument("--task", choices=TASKS, help="default: what the config names")
    plan.add_argument("--r", type=int, metavar="N", help="rank of every method (default: 8)")
    budget = plan.add_mutually_exclusive_group()
    budget.add_argument(
        "--budget", metavar="N", help="solve for the ranks that train at most N parameters, such as 1.2M"
    )
    budget.add_argument("--budget-of", metavar="NAME:r=N", help="the same, at what this method trains: lora:r=8")
    plan.add_argument("--labels", type=int, metavar="N", help="classes of a classification head (default: 2)")
    plan.add_argument("--revision", help="branch, tag or commit of a hub model")
    plan.add_argument("--json", action="store_true", help="print JSON instead of the table")
    gelora = plan.add_argument_group("--method gelora", "choose ranks from the intrinsic dimensions of your texts")
    gelora.add_argument("--data", help="as data.source in a run file")
    gelora.add_argument("--points", type=int, help="texts to measure (default: 2000)")
    gelora.add_argument("--seed", type=int)
    gelora.add_argument("--rounding", choices=("round", "ceil_diff", "floor_diff"))
    gelora.add_argument("--max-rank", type=int)
    gelora.add_argument("--max-length", type=int, help="longest text in tokens")
    gelora.add_argument("--text", help="column of the texts (default: text)")
    gelora.add_argument("--pair", help="column of second texts")
    gelora.add_argument("-o", "--out", help="write the plan here (JSON)")
    gelora.add_argument("--picture", help="SVG, PNG or PDF of dimension and rank by layer")
    gelora.add_argument("--force", action="store_true", help="replace files that exist")

    inspect = command("inspect", _inspect, "show rank, norm and spectrum of an adapter, or ranks over a run's steps")
    inspect.add_argument("path", help="an adapter folder, a run's folder, or a ranks.jsonl")
    inspect.add_argument("--picture", help="SVG, PNG or PDF heat map")
    inspect.add_argument("--json", action="store_true")
    inspect.add_argument("--base", help="base model, if not the one that the adapter names")
    inspect.add_argument("--adapter-name", default="default", help="which adapter's ranks of a run")
    inspect.add_argument("--force", action="store_true", help="replace pictures that exist")

    subspace = command("subspace", _subspace, "build the common subspace that CoRA starts from")
    subspace.add_argument("models", nargs="+", help="folders of fine-tuned models of one architecture")
    subspace.add_argument("-o", "--out", required=True, help="the basis file to write (.safetensors)")
    subspace.add_argument("--base", help="folder of their common base; needed for --source delta")
    subspace.add_argument(
        "--targets", type=_names, metavar="A,B", help="ends of module names (default: q_proj,k_proj,v_proj)"
    )
    subspace.add_argument(
        "--scope",
        choices=("layer", "module", "global"),
        help="what shares a basis (default: layer, or module where output sizes differ)",
    )
    subspace.add_argument("--source", choices=("weights", "delta"), default="weights")
    subspace.add_argument("--rank", type=int, default=32, help="columns to keep; adapters may use fewer (default: 32)")
    subspace.add_argument("--force", action="store_true", help="replace the file if it exists")
    subspace.add_argument("--scale", choices=("none", "sqrt_sigma"), default="none")

    command("version", _version, "print the versions of rankfold and what it stands on")
    return parser


# --- printing -----------------------------------------------------------------------------------------------------------


def _quiet() -> None:
    """Leave the terminal to the run: no bars for loading files, no chatter about freshly made heads."""
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def _print_table(title: str, lines: Sequence[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for name, value in lines:
        table.add_row(name, value)
    Console().print(table, soft_wrap=False)


def _command_line() -> str:
    return shlex.join(["rankfold", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
