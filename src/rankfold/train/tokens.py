"""How long rows may be, and what is cut off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankfold.tasks import table
from rankfold.tasks.rows import DataError, Encoded, Rows
from rankfold.text import examples

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from rankfold.runfile.schema import RunFile


def longest_row(run: RunFile, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """`data.max_length`, or what is usual for the task and fits the model; None for rows that are not tokens.

    Raises:
        DataError: more than the model has positions for.
    """
    if (usual := table.get(run.task).max_length) is None:
        return None
    # BERT and GPT-2 kinds have a table of positions; RoBERTa's starts behind the padding index.
    offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    positions = getattr(config, "max_position_embeddings", None)
    fits = min(tokenizer.model_max_length, positions - offset if positions else tokenizer.model_max_length)
    wanted = run.data.max_length
    if wanted is None:
        return min(usual, fits)
    if wanted > fits:
        raise DataError(f"data.max_length: {wanted:,} tokens do not fit the model, which takes {fits:,}")
    return wanted


def note_cut_off(rows: Rows, counts: dict[str, list[int]], max_length: int) -> None:
    """Adds a note for every split with rows longer than `max_length`."""
    for name, lengths in counts.items():
        if cut := sum(length > max_length for length in lengths):
            rows.notes.append(
                f"{name}: {cut:,} of {len(lengths):,} rows are longer than {max_length:,} tokens and are cut off there "
                f"(the longest has {max(lengths):,}); raise data.max_length to keep them whole"
            )


def without_unlearnable(
    run: RunFile, rows: Rows, split: str, encoded: Encoded, max_length: int | None, kept: str
) -> Encoded:
    """A split without the rows of which nothing is left to learn when they are cut off; a note says how many.

    Args:
        kept: which end of a row is kept, "keep_start" or "keep_end".

    Raises:
        DataError: all of them.
    """
    if max_length is None:
        return encoded
    left = slice(max_length) if kept == "keep_start" else slice(-max_length, None)
    good = table.get(run.task).learnable(encoded.rows, left)
    count = len(encoded.lengths)
    if len(good) == count:
        return encoded
    if not good:
        raise DataError(
            f"{split}: none of the {count:,} rows has anything to learn within {max_length:,} tokens; the prompts alone are as "
            f"long (the longest row has {max(encoded.longest):,}): raise data.max_length, or shorten them"
        )
    left_out = sorted(set(range(count)) - set(good))
    rows.notes.append(
        f"{split}: {len(left_out):,} of {count:,} rows are left out, because within {max_length:,} tokens they have nothing to learn "
        f"(row {examples([str(i + 1) for i in left_out])}); raise data.max_length to keep them"
    )
    rows.splits[split] = rows.splits[split].select(good)
    return encoded.select(good)
