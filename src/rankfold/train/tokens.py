"""Rows as tokens: how long they are, what is cut off, and what classification trains on (TRL tokenizes for itself)."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from rankfold.train.chats import template_marks_turns, with_labels
from rankfold.train.data import Rows
from rankfold.train.datafile import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from rankfold.runfile.schema import RunFile


def longest_row(run: RunFile, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """`data.max_length`, or what is usual for the task and fits the model.

    Raises:
        DataError: more than the model has positions for.
    """
    # BERT and GPT-2 kinds have a table of positions; RoBERTa's starts behind the padding index.
    offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    positions = getattr(config, "max_position_embeddings", None)
    fits = min(tokenizer.model_max_length, positions - offset if positions else tokenizer.model_max_length)
    wanted = run.data.max_length
    if wanted is None:
        return min(512 if run.task == "classification" else 1024, fits)
    if wanted > fits:
        raise DataError(f"data.max_length: {wanted:,} tokens do not fit the model, which takes {fits:,}")
    return wanted


def token_counts(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """The length of every row of every split in tokens, before anything is cut off.

    Raises:
        DataError: chats, and a tokenizer without a chat template.
    """
    inputs = rows.inputs
    if tokenizer.chat_template is None and not isinstance(rows.splits["train"][0][inputs[0]], str):
        raise DataError(
            "the rows are chats but the model's tokenizer has no chat template; take an instruct model, or give the rows as "
            "prompt and completion"
        )

    def count(batch: dict[str, list]) -> dict[str, list[int]]:
        first = batch[inputs[0]]
        if not isinstance(first[0], str):
            chats = [list(chain(*parts)) for parts in zip(*(batch[column] for column in inputs), strict=True)]
            ids = [tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False) for chat in chats]
        elif inputs == ("text", "text_pair"):
            ids = tokenizer(first, batch["text_pair"], verbose=False)["input_ids"]
        else:
            texts = ["".join(parts) for parts in zip(*(batch[column] for column in inputs), strict=True)]
            ids = tokenizer(texts, verbose=False)["input_ids"]
        return {"length": [len(row) for row in ids]}

    counted = {
        name: split.map(count, batched=True, remove_columns=split.column_names) for name, split in rows.splits.items()
    }
    return {name: split["length"][:] for name, split in counted.items()}


def note_cut_off(rows: Rows, counts: dict[str, list[int]], max_length: int) -> None:
    """A note for every split with rows longer than `max_length`."""
    for name, lengths in counts.items():
        if cut := sum(length > max_length for length in lengths):
            rows.notes.append(
                f"{name}: {cut:,} of {len(lengths):,} rows are longer than {max_length:,} tokens and are cut off there "
                f"(the longest has {max(lengths):,}); raise data.max_length to keep them whole"
            )


def for_trainer(
    split: Dataset, rows: Rows, run: RunFile, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    """A split as its trainer takes it: token ids and labels for Trainer, and for TRL what it cannot label by itself."""
    if run.task == "classification":

        def encode(batch: dict[str, list]) -> dict[str, list]:
            ids = tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=max_length)
            return {**ids, "labels": batch["label"]}

        return split.map(encode, batched=True, remove_columns=split.column_names)
    if rows.kind == ("messages",) and run.data.loss_on == "completion" and not template_marks_turns(tokenizer):
        return with_labels(split, tokenizer)
    return split
