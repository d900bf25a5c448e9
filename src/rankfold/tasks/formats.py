"""The usual forms of rows for language models that are not ours: taken as chats, or refused with what to write instead."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from rankfold.tasks.rows import DataError, mapped

if TYPE_CHECKING:
    from datasets import Dataset

QUESTIONS = ("prompt", "question", "query", "instruction", "input", "problem")
ANSWERS = ("completion", "answer", "response", "output", "solution", "target")


def as_ours(split: Dataset) -> Dataset:
    """The rows with Alpaca's and ShareGPT's columns as `messages`.

    Raises:
        DataError: rows of preferences.
    """
    columns = set(split.column_names)
    if "conversations" in columns:  # ShareGPT
        return split.rename_column("conversations", "messages")
    if {"instruction", "output"} <= columns:  # Alpaca
        return mapped(split, _of_alpaca, remove_columns=[c for c in ("instruction", "input", "output") if c in columns])
    if {"chosen", "rejected"} <= columns:
        chats = isinstance(split[0]["chosen"], list)
        use = "{messages: chosen}" if chats else "{completion: chosen}" if "prompt" in columns else "{text: chosen}"
        raise DataError(
            "these are rows of preferences (chosen, rejected), as for DPO: use task: preference; to learn the chosen answers alone, "
            f"use data.columns: {use}"
        )
    return split


def refuse_undesired(split: Dataset) -> None:
    """Raises DataError for rows of KTO (prompt, completion, label), some of which show what is not wanted."""
    if not {"prompt", "completion", "label"} <= set(split.column_names):
        return
    labels = [str(label).casefold() for label in split["label"]]
    if set(labels) <= {"true", "false"} and (undesired := labels.count("false")):
        raise DataError(
            f"the column 'label' says false of {undesired:,} of {len(labels):,} completions, as for KTO: they would be learnt like "
            "the others; keep only the rows whose label is true, or remove the column if it means something else"
        )


def advice(columns: Collection[str]) -> str:
    """What to write in data.columns for rows with these columns."""
    asked = next((name for name in QUESTIONS if name in columns), None)
    answered = next((name for name in ANSWERS if name in columns), None)
    if asked and answered:
        return f"{{prompt: {asked}, completion: {answered}}}"
    return f"{{text: {next(iter(columns))}}}" if len(columns) == 1 else "{prompt: ..., completion: ...} or {text: ...}"


def _of_alpaca(row: dict[str, Any]) -> dict[str, Any]:
    asked = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]}
