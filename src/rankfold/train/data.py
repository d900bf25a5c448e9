"""The rows of a run: found, brought to the names the trainers know, checked, and split.

Whatever the source, a split ends with the columns of one *kind* of its task. What a reader should know and need not fix
(duplicates across splits, texts cut off, empty texts) becomes a note; what would train on the wrong thing is an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rankfold.errors import nearest
from rankfold.tasks import table
from rankfold.tasks.classes import only
from rankfold.tasks.rows import SPLITS, DataError, Rows
from rankfold.tasks.task import Task
from rankfold.train.datafile import SUFFIXES, is_data_file, read_file

if TYPE_CHECKING:
    from datasets import Dataset

    from rankfold.runfile.schema import Data, RunFile


def load_rows(run: RunFile, known: Sequence[str] = ()) -> Rows:
    """Find, check and split the run's rows.

    Args:
        known: the classes of the head that the run begins with, in order of their index.

    Raises:
        DataError: with file or split, row or column, and the fix.
    """
    task, names = table.get(run.task), run.data.columns.names
    splits = _find(run.data, task)
    splits = {name: task.as_ours(split, names) for name, split in splits.items()}
    train = splits["train"]
    kind = task.kind(train.column_names, names)
    targets = tuple(column for column in kind if column in task.targets)
    carried = task.carried(train, names, kind)
    used = {name: _with_kind(split, names, kind, carried, name) for name, split in splits.items()}
    if run.data.classes is not None:
        used = {name: only(split, targets[0], run.data.classes, name) for name, split in used.items()}
    rows = Rows(used, kind, targets, carried, known)
    if unused := [c for c in train.column_names if c not in {*carried, *(names.get(role, role) for role in kind)}]:
        rows.notes.append(f"train: not used: the column{'s' if unused[1:] else ''} {', '.join(unused)}")
    for name, split in list(rows.splits.items()):
        _check_inputs(split, name, rows, task)
    _hold_out(rows, run, task)
    for name in list(rows.splits):
        most, split = getattr(run.data, f"max_{name}"), rows.splits[name]
        if most is not None and most < len(split):
            rows.splits[name] = split.shuffle(seed=run.rows_seed).select(range(most))
    _note_duplicates(rows, task)
    rows.digests = {name: _digest(split, task) for name, split in rows.splits.items()}
    task.finish(rows, run.data)
    return rows


# --- finding ------------------------------------------------------------------------------------------------------------


def _find(data: Data, task: Task) -> dict[str, Dataset]:
    """The splits as they are in the source; shares (validation: 0.1) are not held out yet."""

    def read(path: Path) -> Dataset:
        return task.placed(read_file(path), data.columns.names, path.absolute().parent)

    found = _source(data.source, data.subset, task, read) if data.source else {}
    splits = {}
    for name in SPLITS:
        wanted = getattr(data, name)
        if isinstance(wanted, float):
            continue
        if wanted is None:
            if name in found:
                splits[name] = found[name]
        elif wanted in found:
            splits[name] = found[wanted]
        elif is_data_file(wanted):
            splits[name] = read(Path(wanted))
        elif Path(wanted).is_dir() and (inside := task.folder(Path(wanted))):
            splits[name] = inside["train"]
        else:
            raise DataError(
                f"data.{name}: '{wanted}' is neither a file ({', '.join(SUFFIXES)}) nor a split of {data.source}"
                f"{nearest(wanted, found, 'its splits')}"
            )
    if "train" not in splits:
        raise DataError(f"{data.source} has no split 'train'; name one in data.train; its splits: {', '.join(found)}")
    for name, split in splits.items():
        if len(split) == 0:
            raise DataError(f"data.{name}: the split is empty")
    return splits


def _source(name: str, subset: str | None, task: Task, read: Callable[[Path], Dataset]) -> dict[str, Dataset]:
    from rankfold.io import assets as bundled

    if name in bundled.DATASETS:
        return {str(split): rows for split, rows in bundled.dataset(name).items()}
    path = Path(name)
    if path.is_file() or is_data_file(name):
        return {"train": read(path)}
    if path.is_dir():
        there = {s: [file for suffix in SUFFIXES if (file := path / f"{s}{suffix}").is_file()] for s in SPLITS}
        files = {split: found[0] for split, found in there.items() if found}
        if twice := next((found for found in there.values() if found[1:]), None):
            raise DataError(
                f"folder '{name}' has both {twice[0].name} and {twice[1].name}; remove one, or name the files in data.train, ..."
            )
        if not files and (inside := task.folder(path)):
            return inside
        if "train" not in files:
            raise DataError(f"folder '{name}' has no file train.jsonl (or {', '.join(SUFFIXES[1:])})")
        return {split: read(file) for split, file in files.items()}

    from datasets import DatasetDict, load_dataset

    try:
        loaded = load_dataset(name, subset)
    except Exception as e:  # whatever the hub, the network or a loading script can raise
        raise DataError(
            f"data.source: '{name}' is neither a local file or folder nor a bundled data set"
            f"{nearest(name, bundled.DATASETS, 'bundled')}; as a datasets name it cannot be loaded: {e}"
        ) from e
    if not isinstance(loaded, DatasetDict):
        raise DataError(f"data.source: '{name}' cannot be streamed here; download it first")
    return {str(split): rows for split, rows in loaded.items()}


# --- columns ------------------------------------------------------------------------------------------------------------


def _with_kind(
    rows: Dataset, called: dict[str, str], kind: tuple[str, ...], carried: tuple[str, ...], split: str
) -> Dataset:
    """The columns of `kind` under our names, and those that are carried; no others."""
    from datasets import ClassLabel

    names = {role: called.get(role, role) for role in kind}
    for role, column in names.items():
        if column not in rows.column_names:
            raise DataError(
                f"{split} has no column '{column}' for the {role}{nearest(column, rows.column_names, 'it has')}. "
                f"Name the right one in data.columns: {{{role}: ...}}"
            )
    rows = rows.select_columns([*names.values(), *(c for c in carried if c in rows.column_names)])
    for column in names.values():
        # Names instead of indices, so that files and hub data sets are handled alike.
        if isinstance(feature := rows.features[column], ClassLabel):
            texts = [None if i is None or i < 0 else feature.int2str(i) for i in rows[column]]
            rows = rows.remove_columns(column).add_column(column, texts)
        elif isinstance(each := getattr(feature, "feature", None), ClassLabel):
            texts = [[None if i is None or i < 0 else each.int2str(i) for i in row or ()] for row in rows[column]]
            rows = rows.remove_columns(column).add_column(column, texts)
    return rows.rename_columns({column: role for role, column in names.items() if column != role})


# --- contents -----------------------------------------------------------------------------------------------------------


def _check_inputs(rows: Dataset, split: str, found: Rows, task: Task) -> None:
    for column in found.inputs:
        empty = 0
        for number, value in enumerate(rows[column], 1):
            if problem := task.problem(value, column, found.kind):
                raise DataError(f"{split}, row {number}: column '{column}' {problem}")
            empty += isinstance(value, str) and not value.strip()
        if empty:
            found.notes.append(f"{split}: {empty:,} of {len(rows):,} rows have an empty {column}")
    found.splits[split] = task.tidy(rows, found.kind, split, found.notes)


def _hold_out(rows: Rows, run: RunFile, task: Task) -> None:
    """Take the shares of `validation: 0.1` and `test: 0.1` from the training rows.

    By a hash of the text, so that duplicates never come to lie on both sides and a row keeps its side when others are added.
    """
    shares = {name: share for name in ("test", "validation") if isinstance(share := getattr(run.data, name), float)}
    if not shares:
        return
    train = rows.splits["train"]
    taken: dict[str, list[int]] = {name: [] for name in (*shares, "train")}
    for i, row in enumerate(train):
        digest = hashlib.sha256(f"{run.rows_seed}\0{task.key(row, rows.inputs)}".encode()).digest()
        at, below = int.from_bytes(digest[:8], "big") / 2**64, 0.0
        for name, share in shares.items():
            below += share
            if at < below:
                taken[name].append(i)
                break
        else:
            taken["train"].append(i)
    for name, indices in taken.items():
        if not indices:
            share = shares.get(name, 1 - sum(shares.values()))
            raise DataError(
                f"data.{name}: a share of {share:g} of {len(train)} rows leaves none; give more rows or a file"
            )
        rows.splits[name] = train.select(indices)


def _digest(split: Dataset, task: Task) -> str:
    """Of the rows and their order."""
    made = hashlib.sha256()
    for row in split:
        made.update(f"{task.content(row)}\n".encode())
    return made.hexdigest()


def _note_duplicates(rows: Rows, task: Task) -> None:
    train = {task.key(row, rows.inputs) for row in rows.splits["train"]}
    for name in ("validation", "test"):
        split = rows[name]
        if split is not None and (twice := sum(task.key(row, rows.inputs) in train for row in split)):
            rows.notes.append(
                f"{name}: {twice:,} of {len(split):,} {task.keyed} also occur in train; scores on them show memory, not learning"
            )
