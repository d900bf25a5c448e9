"""`rankfold gelora`, also reached as `rankfold plan --method gelora`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rankfold.commands.command import CommonOptions, names, option

if TYPE_CHECKING:
    from rankfold.gelora.ranks import GeloraPlan
    from rankfold.gelora.samples import Sample
    from rankfold.runfile.schema import RunFile


@dataclass(kw_only=True)
class Measure:
    """What is measured and where it goes. A language model's prompt + completion or messages are found by themselves."""

    data: str = option("as data.source in a run file")
    points: int = option("texts to measure", default=2000)
    seed: int = option("of the draw of the texts", default=0)
    rounding: Literal["round", "ceil_diff", "floor_diff"] = option(
        "round: each dimension first; ceil_diff, floor_diff: the difference", default="round"
    )
    max_rank: int | None = option("no rank above this", default=None)
    max_length: int | None = option("longest text in tokens", default=None)
    text: str = option("column of the texts", default="text")
    pair: str | None = option("column of second texts", default=None)
    out: str | None = option("write the plan here (JSON)", default=None, short="-o")
    picture: str | None = option("SVG, PNG or PDF of dimension and rank by layer", default=None)
    force: bool = option("replace files that exist", default=False)


@dataclass(kw_only=True)
class Options(Measure, CommonOptions):
    """choose ranks from the intrinsic dimensions of your texts, before training"""

    model: str = option("a bundled name, folder, GGUF file or hub id")
    targets: list[str] | None = option(
        "ends of module names (default: the matrices of attention)", default=None, type=names, metavar="A,B"
    )
    json: bool = option("print JSON instead of the table", default=False)


def run(options: Options) -> int:
    plan = measured(options)
    if options.json:
        print(plan.to_json(), end="")
        return 0
    from rankfold.gelora import show
    from rankfold.text import terminal

    terminal().print(show.table(plan))
    for name in filter(None, (options.out, options.picture)):
        print(f"wrote {name}")
    return 0


def measured(options: Options) -> GeloraPlan:
    """Measures the model on the training rows, and writes what was asked for.

    Raises:
        RunFileError, DataError, ModelError, RankfoldError: what is wrong, before anything is written.
        FileExistsError: without `force`.
    """
    from rankfold.inspect.pictures import check_picture

    if options.picture:
        check_picture(Path(options.picture))
    for name in filter(None, (options.out, options.picture)):
        if Path(name).exists() and not options.force:
            raise FileExistsError(f"'{name}' exists; give another name or --force")
    plan = _plan(_run_file(options), options)
    _write(plan, options)
    return plan


def _run_file(options: Options) -> RunFile:
    """The run file that would train on these rows, so that they are found and checked as in training."""
    from rankfold.runfile.load import parse

    columns = {"text": options.text} if options.text != "text" else {}
    return parse(
        {
            "model": options.model,
            "task": "classification" if options.pair else "causal-lm",
            "data": {
                "source": options.data,
                "columns": {**columns, "text_pair": options.pair},
                "max_length": options.max_length,
            },
            "method": "lora",
            "output": "unused",
        },
        where="plan",
    )


def _plan(run: RunFile, options: Options) -> GeloraPlan:
    import torch
    from transformers import AutoModel

    from rankfold.gelora.ranks import gelora_plan
    from rankfold.io.models import locate
    from rankfold.train import model, tokens
    from rankfold.train.data import load_rows

    rows = load_rows(run)
    place = locate(run.model.name)
    tokenizer = model.load_tokenizer(run.model, place)
    config = model.load_config(run, place, rows.labels)
    network = AutoModel.from_pretrained(
        place, config=config, dtype=torch.float32, trust_remote_code=run.model.trust_remote_code
    )  # no head: its names fit with one, too
    columns = [list(rows.splits["train"][name]) for name in rows.inputs]
    texts = columns[0] if len(columns) == 1 else [_joined(parts) for parts in zip(*columns, strict=True)]
    plan = gelora_plan(
        network,
        tokenizer,
        texts,
        max_length=tokens.longest_row(run, config, tokenizer),
        data=str(run.data.source),
        points=options.points,
        seed=options.seed,
        rounding=options.rounding,
        max_rank=options.max_rank,
        targets=options.targets,
    )
    return replace(plan, model=run.model.name)


def _joined(parts: tuple) -> Sample:
    """A prompt and its completion, both texts or both chats."""
    return parts if isinstance(parts[0], str) else [message for part in parts for message in part]


def _write(plan: GeloraPlan, options: Options) -> None:
    from rankfold.gelora import show
    from rankfold.io.files import write_whole

    for name in filter(None, (options.out, options.picture)):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
    if options.out:
        write_whole(Path(options.out), plan.to_json())
    if options.picture:
        show.picture(plan, Path(options.picture))
