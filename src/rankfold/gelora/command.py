"""`rankfold plan --method gelora`: what the command line calls once it has parsed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rankfold.gelora import show
from rankfold.gelora.ranks import GeloraPlan, Rounding, gelora_plan
from rankfold.gelora.samples import Sample
from rankfold.inspect.pictures import check_picture

if TYPE_CHECKING:
    from rankfold.runfile.schema import RunFile


def run_gelora(
    model: str,
    data: str,
    *,
    points: int = 2000,
    seed: int = 0,
    rounding: Rounding = "round",
    max_rank: int | None = None,
    targets: Sequence[str] | None = None,
    max_length: int | None = None,
    text: str = "text",
    pair: str | None = None,
    out: str | None = None,
    picture: str | None = None,
    json: bool = False,
    force: bool = False,
) -> GeloraPlan:
    """Measures `model` on the training rows of `data`, prints the plan, and writes what was asked for.

    Args:
        model: as in a run file: a bundled name, folder, GGUF file or hub id.
        data: as in a run file: a bundled name, file, folder or datasets name.
        text, pair: columns; a language model's prompt + completion or messages are found by themselves.
        out: JSON file of the plan.
        picture: SVG, PNG or PDF.
        json: print the plan as JSON instead of the table.
        force: replace files that exist.

    Raises:
        RunFileError, DataError, ModelError, ValueError: what is wrong, before anything is written.
        FileExistsError: without `force`.
    """
    if picture:
        check_picture(Path(picture))
    for name in filter(None, (out, picture)):
        if Path(name).exists() and not force:
            raise FileExistsError(f"'{name}' exists; give another name or --force")
    plan = _measured(
        _run_file(model, data, text, pair),
        points=points,
        seed=seed,
        rounding=rounding,
        max_rank=max_rank,
        targets=targets,
        max_length=max_length,
    )
    _write(plan, out, picture)
    if json:
        print(plan.to_json(), end="")
        return plan
    from rich.console import Console

    Console().print(show.table(plan))
    for name in filter(None, (out, picture)):
        print(f"wrote {name}")
    return plan


def _run_file(model: str, data: str, text: str, pair: str | None) -> RunFile:
    """The run file that would train on these rows, so that they are found and checked as in training."""
    from rankfold.runfile.load import parse

    columns = {"text": text} if text != "text" else {}
    return parse(
        {
            "model": model,
            "task": "classification" if pair else "causal-lm",
            "data": {"source": data, "columns": {**columns, "text_pair": pair}},
            "method": "lora",
            "output": "unused",
        },
        where="plan",
    )


def _measured(run: RunFile, *, max_length: int | None, **options) -> GeloraPlan:
    import torch
    from transformers import AutoModel

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
        max_length=max_length or tokens.longest_row(run, config, tokenizer) or tokenizer.model_max_length,
        data=str(run.data.source),
        **options,
    )
    return replace(plan, model=run.model.name)


def _joined(parts: tuple) -> Sample:
    """A prompt and its completion, both texts or both chats."""
    return parts if isinstance(parts[0], str) else [message for part in parts for message in part]


def _write(plan: GeloraPlan, out: str | None, picture: str | None) -> None:
    from rankfold.io.files import write_whole

    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(out), plan.to_json())
    if picture:
        Path(picture).parent.mkdir(parents=True, exist_ok=True)
        show.picture(plan, Path(picture))
