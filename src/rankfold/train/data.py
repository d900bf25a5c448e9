"""The rows of a run: found, brought to the names the trainers know, checked, and split.

Whatever the source, a split ends with the columns of one *kind*: `text` (+ `text_pair`) and `label` for classification;
`messages`, `prompt` + `completion`, or `text` for a causal language model. What a reader should know and need not fix
(duplicates across splits, texts cut off, empty texts) becomes a note; what would train on the wrong thing is an error.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankfold.runfile.problems import nearest, short
from rankfold.train.chats import not_a_chat
from rankfold.train.datafile import SUFFIXES, DataError, is_data_file, read_file

if TYPE_CHECKING:
    from datasets import Dataset

    from rankfold.runfile.schema import Data, RunFile

SPLITS = ("train", "validation", "test")


@dataclass
class Rows:
    """The rows of a run, by split, and what is known of them.

    Args:
        kind: the columns that every split has.
        labels: the classes in order of their index; the `label` column holds indices. Empty for a language model.
        notes: sentences for the reader.
    """

    splits: dict[str, Dataset]
    kind: tuple[str, ...]
    labels: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, split: str) -> Dataset | None:
        return self.splits.get(split)

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(column for column in self.kind if column != "label")


def load_rows(run: RunFile) -> Rows:
    """Find, check and split the run's rows.

    Raises:
        DataError: with file or split, row or column, and the fix.
    """
    splits = _find(run.data)
    kind = _kind(run, splits["train"].column_names)
    rows = Rows({name: _with_kind(split, run, kind, name) for name, split in splits.items()}, kind)
    for name, split in rows.splits.items():
        _check_inputs(split, name, rows)
    _hold_out(rows, run)
    for name in list(rows.splits):
        most, split = getattr(run.data, f"max_{name}"), rows.splits[name]
        if most is not None and most < len(split):
            rows.splits[name] = split.shuffle(seed=run.rows_seed).select(range(most))
    _note_duplicates(rows)
    if run.task == "classification":
        _index_labels(rows, run.data.labels)
    return rows


# --- finding ------------------------------------------------------------------------------------------------------------


def _find(data: Data) -> dict[str, Dataset]:
    """The splits as they are in the source; shares (validation: 0.1) are not held out yet."""
    found = _source(data.source, data.subset) if data.source else {}
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
            splits[name] = read_file(Path(wanted))
        else:
            raise DataError(
                f"data.{name}: '{wanted}' is no file ({', '.join(SUFFIXES)}) and no split of {data.source}"
                f"{nearest(wanted, found, 'its splits')}"
            )
    if "train" not in splits:
        raise DataError(f"{data.source} has no split 'train'; name one in data.train; its splits: {', '.join(found)}")
    for name, split in splits.items():
        if len(split) == 0:
            raise DataError(f"data.{name}: the split is empty")
    return splits


def _source(name: str, subset: str | None) -> dict[str, Dataset]:
    from rankfold.io import assets as bundled

    if name in bundled.DATASETS:
        return {str(split): rows for split, rows in bundled.dataset(name).items()}
    path = Path(name)
    if path.is_file() or is_data_file(name):
        return {"train": read_file(path)}
    if path.is_dir():
        files = {s: file for s in SPLITS for suffix in SUFFIXES if (file := path / f"{s}{suffix}").is_file()}
        if "train" not in files:
            raise DataError(f"folder '{name}' has no file train.jsonl (or {', '.join(SUFFIXES[1:])})")
        return {split: read_file(file) for split, file in files.items()}

    from datasets import DatasetDict, load_dataset

    try:
        loaded = load_dataset(name, subset)
    except Exception as e:  # whatever the hub, the network or a loading script can raise
        raise DataError(
            f"data.source: '{name}' is no local file or folder and no bundled data set"
            f"{nearest(name, bundled.DATASETS, 'bundled')}; as a datasets name it cannot be loaded: {e}"
        ) from e
    if not isinstance(loaded, DatasetDict):
        raise DataError(f"data.source: '{name}' cannot be streamed here; download it first")
    return {str(split): rows for split, rows in loaded.items()}


# --- columns ------------------------------------------------------------------------------------------------------------


def _kind(run: RunFile, columns: list[str]) -> tuple[str, ...]:
    """Which of our columns the rows have, by the run's column names."""
    names = run.data.columns
    if run.task == "classification":
        return ("text", "text_pair", "label") if names.text_pair else ("text", "label")
    kinds = [("messages",), ("prompt", "completion"), ("text",)]
    for kind in kinds:  # what the run file names wins over what happens to be there
        if names.model_fields_set.intersection(kind) and any(_renamed(run, role) for role in kind):
            return kind
    for kind in kinds:
        if all(getattr(names, role) in columns for role in kind):
            return kind
    raise DataError(
        f"train has none of the columns messages, prompt + completion, or text; it has: {', '.join(columns)}. "
        f"Say which is which, for instance data.columns: {{text: {columns[0]}}}"
    )


def _renamed(run: RunFile, role: str) -> bool:
    return getattr(run.data.columns, role) != role


def _with_kind(rows: Dataset, run: RunFile, kind: tuple[str, ...], split: str) -> Dataset:
    """The columns of `kind` alone, under our names."""
    from datasets import ClassLabel

    names: dict[str, str] = {role: getattr(run.data.columns, role) for role in kind}
    for role, column in names.items():
        if column not in rows.column_names:
            raise DataError(
                f"{split} has no column '{column}' for the {role}{nearest(column, rows.column_names, 'it has')}. "
                f"Name the right one in data.columns: {{{role}: ...}}"
            )
    rows = rows.select_columns(list(names.values()))
    if isinstance(feature := rows.features.get(names.get("label", "")), ClassLabel):
        # Names instead of indices, so that files and hub data sets are handled alike.
        texts = [None if i is None or i < 0 else feature.int2str(i) for i in rows[names["label"]]]
        rows = rows.remove_columns(names["label"]).add_column(names["label"], texts)
    return rows.rename_columns({column: role for role, column in names.items() if column != role})


# --- contents -----------------------------------------------------------------------------------------------------------


def _check_inputs(rows: Dataset, split: str, found: Rows) -> None:
    for column in found.inputs:
        empty = 0
        for number, value in enumerate(rows[column], 1):
            if isinstance(value, str):
                empty += not value.strip()
            elif (
                problem := not_a_chat(value) if _may_be_chat(column, found.kind) else f"holds {short(value)}, not text"
            ):
                raise DataError(f"{split}, row {number}: column '{column}' {problem}")
        if empty:
            found.notes.append(f"{split}: {empty:,} of {len(rows):,} rows have an empty {column}")
    if found.kind == ("messages",):
        from trl.data_utils import maybe_convert_to_chatml

        found.splits[split] = rows.map(maybe_convert_to_chatml)  # {from, value} as {role, content}


def _may_be_chat(column: str, kind: tuple[str, ...]) -> bool:
    return column == "messages" or kind == ("prompt", "completion")


def _key(row: Any, inputs: tuple[str, ...]) -> str:
    """Rows that differ only in case or spaces are duplicates."""
    texts = [row[column] if isinstance(row[column], str) else json.dumps(row[column]) for column in inputs]
    return "\0".join(" ".join(text.casefold().split()) for text in texts)


def _hold_out(rows: Rows, run: RunFile) -> None:
    """Take the shares of `validation: 0.1` and `test: 0.1` from the training rows.

    By a hash of the text, so that duplicates never come to lie on both sides and a row keeps its side when others are added.
    """
    shares = {name: share for name in ("test", "validation") if isinstance(share := getattr(run.data, name), float)}
    if not shares:
        return
    train = rows.splits["train"]
    taken: dict[str, list[int]] = {name: [] for name in (*shares, "train")}
    for i, row in enumerate(train):
        digest = hashlib.sha256(f"{run.rows_seed}\0{_key(row, rows.inputs)}".encode()).digest()
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


def _note_duplicates(rows: Rows) -> None:
    train = {_key(row, rows.inputs) for row in rows.splits["train"]}
    for name in ("validation", "test"):
        split = rows[name]
        if split is not None and (twice := sum(_key(row, rows.inputs) in train for row in split)):
            rows.notes.append(
                f"{name}: {twice:,} of {len(split):,} rows also occur in train; scores on them show memory, not learning"
            )


# --- labels -------------------------------------------------------------------------------------------------------------


def _index_labels(rows: Rows, order: list[str | int] | None) -> None:
    """Replace labels by indices."""
    from datasets import ClassLabel

    for name, split in rows.splits.items():
        for number, label in enumerate(split["label"], 1):
            if not isinstance(label, str | int):
                what = "is missing" if label is None else f"is {short(label)}; a class is text or a whole number"
                raise DataError(f"{name}, row {number}: the label {what}")
    counts = {name: Counter(split["label"]) for name, split in rows.splits.items()}
    seen = sorted(counts["train"], key=lambda label: (isinstance(label, str), _natural(label)))
    labels = [str(label) for label in (order if order is not None else seen)]
    if len(labels) < 2:
        raise DataError(f"train has the single label {short(seen[0])}; classification needs at least two")
    if repeated := [label for label, count in Counter(labels).items() if count > 1]:
        raise DataError(f"data.labels names {', '.join(map(repr, repeated))} more than once")
    for name, counter in counts.items():
        known = labels if name == "train" else {str(label) for label in seen}
        for label, count in counter.items():
            if str(label) not in known:
                where = "is not in data.labels" if name == "train" else "is never seen in train"
                raise DataError(
                    f"{name}: the label {short(label)} ({count:,} {'row' if count == 1 else 'rows'}) {where}; "
                    f"known labels: {', '.join(map(str, known if name == 'train' else seen))}"
                )
    if unseen := set(labels) - {str(label) for label in seen}:
        rows.notes.append(f"train: no row has the label {', '.join(sorted(unseen))} of data.labels")
    index = {label: i for i, label in enumerate(labels)}
    rows.labels = labels
    for name, split in rows.splits.items():
        indices = [index[str(label)] for label in split["label"]]
        split = split.remove_columns("label").add_column("label", indices)
        rows.splits[name] = split.cast_column("label", ClassLabel(names=labels))


def _natural(label: str | int) -> tuple[int, int, str]:
    """10 after 9, also where a CSV file made them text."""
    return (0, int(label), "") if str(label).lstrip("-").isdecimal() else (1, 0, str(label))
