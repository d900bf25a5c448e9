"""Read one local file of rows (JSONL, JSON, CSV, TSV, Parquet), or say which line of it is broken."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankfold.tasks.rows import DataError

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def is_data_file(name: str) -> bool:
    """Does the name look like a file of rows (whether or not it exists)?"""
    return Path(name).suffix in SUFFIXES


def read_file(path: Path) -> Dataset:
    """All rows of a file.

    Raises:
        DataError: missing, empty, broken (with the line) or of an unknown kind.
    """
    from datasets import Dataset, Features, Value
    from datasets.exceptions import DatasetGenerationError

    if not path.is_file():
        raise DataError(f"no data file '{path}' (looked in {path.absolute().parent})")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: cannot read '{path.suffix}' files; use one of {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    try:
        if path.suffix == ".parquet":
            rows = Dataset.from_parquet(str(path))
        elif path.suffix in (".csv", ".tsv"):
            separator = "\t" if path.suffix == ".tsv" else ","
            # Every value stays the text it is: pandas would read 007 as 7 and the word NA as a missing value.
            columns = _columns(path, separator)
            rows = Dataset.from_csv(
                str(path),
                features=Features({c: Value("string") for c in columns}),
                sep=separator,
                keep_default_na=False,
            )
        else:
            rows = Dataset.from_json(str(path))
            if (features := _without_times(rows.features)) != rows.features:
                rows = Dataset.from_json(str(path), features=features)
            with path.open(encoding="utf-8") as lines:  # Arrow does not look, and would fail at the first use
                for _ in lines:
                    pass
    except DataError:
        raise
    except (DatasetGenerationError, ValueError) as e:  # Arrow's and Unicode's errors are ValueErrors
        raise DataError(f"{path}{_what_is_broken(path) or f': cannot be read ({e.__cause__ or e})'}") from e
    return rows


def _columns(path: Path, separator: str) -> list[str]:
    """The names in the first line, which every row must have a field for.

    pandas fills short rows with empty texts, takes the first field of long ones for the row's name, and what follows an open quote
    mark, other rows too, for one field.

    Raises:
        DataError: a row with more or fewer fields, or such a quote mark.
    """
    most, line = csv.field_size_limit(2**31 - 1), 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.reader(lines, delimiter=separator, strict=True)
            columns = next(rows)
            line = rows.line_num + 1
            for row in rows:
                if len(row) != len(columns) and (row[1:] or "".join(row).strip()):
                    raise DataError(
                        f"{path}:{line}: the header has {len(columns)} columns, this row has {len(row)}; a text that holds "
                        f"{separator!r} needs quote marks around it"
                    )
                line = rows.line_num + 1
        return [name or f"Unnamed: {i}" for i, name in enumerate(columns)]  # pandas calls them so; it writes one itself
    except csv.Error as e:
        raise DataError(
            f"{path}:{line}: a quote mark begins a field and does not end it ({e}); put the whole field in quote marks and "
            "write those inside it twice"
        ) from e
    finally:
        csv.field_size_limit(most)


def _without_times(feature: Any) -> Any:
    """A file's columns with text again where Arrow made times of it, as it does with dates of a whole column."""
    from datasets import Json, List, Value

    if isinstance(feature, dict):
        return type(feature)({name: _without_times(part) for name, part in feature.items()})
    if isinstance(feature, List):
        return List(_without_times(feature.feature))
    return Json() if isinstance(feature, Value) and feature.dtype.startswith("timestamp") else feature


def _what_is_broken(path: Path) -> str | None:
    """The line and the reason, as `:7: ...`; None where only the reader knows."""
    if path.suffix == ".parquet":
        return None
    lines = [(number, line) for number, line in enumerate(path.read_bytes().splitlines(), 1) if line.strip()]
    for number, line in lines:
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as e:
            return f":{number}: not UTF-8 text (byte {e.start})"
    if len(lines) <= (path.suffix in (".csv", ".tsv")):
        return ": the file has no rows"
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as e:
            return f":{e.lineno}: malformed JSON ({e.msg}); for one row per line, call the file .jsonl"
    if path.suffix != ".jsonl":
        return None
    for number, line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            return f":{number}: malformed JSON ({e.msg}, column {e.colno})"
        if not isinstance(row, dict):
            return f':{number}: must be an object like {{"text": ...}}, got {type(row).__name__}'
    return None
