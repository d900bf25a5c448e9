"""The output folder of a run: what is in it, and when it may be used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rankfold.errors import RankfoldError
from rankfold.io.files import to_json, write_whole
from rankfold.runfile.load import load
from rankfold.runfile.methods import config_class, config_fields
from rankfold.runfile.optimizers import clip_norm
from rankfold.runfile.problems import RunFileError
from rankfold.runfile.schema import Data, RunFile
from rankfold.text import changes
from rankfold.train.datafile import is_data_file

MAY_CHANGE = (
    "epochs",
    "max_steps",
    "gradient_checkpointing",
    "eval_batch_size",
    "keep_checkpoints",
    "report_to",
)
"""What `--resume` takes up of the training section. The rest lies in the checkpoint, or would make of one run two."""

ROWS = "rows.json"

OURS = ("adapter", "checkpoints", "run.yaml", ROWS, "metrics.jsonl", "result.json", "metrics.png", "metrics.svg")


class FolderError(RankfoldError):
    """The output folder cannot be used; the message says what to do."""


class SaveError(OSError):
    """Something could not be written; nothing of it is left."""


def check(run: RunFile, *, resume: bool, overwrite: bool) -> None:
    """May this run write into its folder? Changes nothing.

    Raises:
        FolderError: it has other contents, or, for `resume`, another run's.
    """
    folder = Path(run.output)
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"output: '{folder}' is a file; name a folder")
    present = sorted(entry.name for entry in folder.iterdir() if not _is_empty(entry)) if folder.is_dir() else []
    if resume and overwrite:
        raise FolderError("--resume continues a run and --overwrite deletes it; use one of the two")
    if resume and present and "run.yaml" not in present:
        raise FolderError(
            f"output: '{folder}' has no run.yaml, so there is no run in it to resume; name another folder"
        )
    if resume:
        _check_same_run(run, folder / "run.yaml")
    elif present and not overwrite:
        raise FolderError(
            f"output: the folder '{folder}' exists and is not empty ({', '.join(present[:3])}{', ...' if present[3:] else ''}); "
            f"continue with --resume, replace with --overwrite, or name another folder"
        )
    elif present and not set(present) & {"run.yaml", "checkpoints", "adapter"}:
        raise FolderError(
            f"output: '{folder}' does not look like the folder of a run; --overwrite will not delete in it"
        )


def _is_empty(entry: Path) -> bool:
    """A folder with nothing in it: transformers' trainer makes that of the checkpoints before it can refuse a run."""
    return entry.is_dir() and not any(entry.iterdir())


def _check_same_run(run: RunFile, saved: Path) -> None:
    if not saved.is_file():
        return
    try:
        before = _settings(load(saved))
    except RunFileError as e:
        raise FolderError(
            f"output: {saved} is damaged, so --resume cannot tell what was trained; use --overwrite\n{e}"
        ) from e
    now = _settings(run)
    # A schedule of ranks that is as long as the run cannot be made longer half-way.
    length = ("epochs", "max_steps") if "total_step" in config_fields(config_class(run.method.name)) else ()
    for values in (before, now):
        values["training"] = {k: v for k, v in values["training"].items() if k in length or k not in MAY_CHANGE}
    fixed = ("model", "task", "data", "method", "training")
    changed = [change for key in fixed for change in changes(key, before[key], now[key])]
    if changed:
        may = [key for key in MAY_CHANGE if key not in length]
        raise FolderError(
            f"output: the run in '{saved.parent}' is another one: {'; '.join(changed)}. Undo the change to resume it, or name "
            f"another output (of training, {', '.join(may)} may change)"
        )


def check_length(run: RunFile) -> None:
    """Raises FolderError where a finished run, one of a row, was trained for another length; one that goes on may change it."""
    trained = load(Path(run.output, "run.yaml")).training
    before, now = ({"epochs": t.epochs, "max_steps": t.max_steps} for t in (trained, run.training))
    if changed := changes("training", before, now):
        raise FolderError(
            f"output: the run in '{run.output}' is done, and was trained otherwise: {'; '.join(changed)}. Undo the change, or name "
            "another output"
        )


def _settings(run: RunFile) -> dict[str, Any]:
    values = run.model_dump()
    return values | {"training": values["training"] | {"max_grad_norm": clip_norm(run.training)}}  # what null means


def write_rows(folder: Path, digests: dict[str, str]) -> None:
    """Writes down what `check_rows` knows the rows by; as `Rows.digests`."""
    write_whole(folder / ROWS, to_json(digests))


def check_rows(folder: Path, digests: dict[str, str], data: Data) -> None:
    """Are the rows those that the work in a folder began with? Earlier versions wrote nothing down; then any are.

    Args:
        digests: of the rows as they are now, as `Rows.digests`. data: where they were found.

    Raises:
        FolderError: a split has other rows.
    """
    if not (folder / ROWS).is_file():
        return
    before = json.loads((folder / ROWS).read_text(encoding="utf-8"))
    for split in before | digests:
        if before.get(split) != digests.get(split):
            named = getattr(data, split)
            source = named if isinstance(named, str) and is_data_file(named) else data.source or data.train
            raise FolderError(
                f"data: '{source}' has other {split} rows than when the work in '{folder}' began; put the old ones back to go on, or "
                "name another output"
            )


def clear(folder: Path) -> None:
    """Delete what runs write, and nothing else."""
    for name in OURS:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Report what goes wrong while `path` is written as a SaveError that says how to go on.

    A full disk is an OSError to Python, a RuntimeError to torch, a SafetensorError to safetensors and a plain Exception to
    tokenizers; any other exception is a bug and passes.
    """
    try:
        yield
    except Exception as e:
        if isinstance(e, OSError | RuntimeError | SafetensorError) or type(e) is Exception:
            raise SaveError(f"cannot save {path}: {e}; make room and continue with --resume") from e
        raise
