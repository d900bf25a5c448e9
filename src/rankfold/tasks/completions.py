"""Prompts with their completions as the tokens of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from rankfold.tasks.chats import Chat, Options, options, token_ids, without_nulls
from rankfold.tasks.rows import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Tokens = list[list[int]]


def whole_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """The tokens of texts, with the end of the text."""
    end = str(tokenizer.eos_token or "")
    return _tokens([text if text.endswith(end) else text + end for text in texts], tokenizer)


def _tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """The tokens of texts; one that a chat template made begins with the beginning that the tokenizer adds, and keeps one of the two."""
    begin, found = tokenizer.bos_token_id, tokenizer(texts, verbose=False)["input_ids"]
    return [ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids for ids in found]  # pyright: ignore[reportReturnType, reportGeneralTypeIssues]


def pairs_of_texts(
    prompts: list[str], completions: list[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[Tokens, Tokens]:
    """The tokens of prompts with their completions, and of the prompts alone."""
    wholes = whole_texts([p + c for p, c in zip(prompts, completions, strict=True)], tokenizer)
    return wholes, _tokens(prompts, tokenizer)


def pairs_of_chats(
    prompts: list[Chat], completions: list[Chat], given: list[Options], tokenizer: PreTrainedTokenizerBase
) -> tuple[Tokens, Tokens]:
    """As `pairs_of_texts`, of chats; the prompt alone asks for the answer."""
    rows = list(zip(prompts, completions, given, strict=True))
    wholes = [token_ids(tokenizer, prompt, completion, given=g) for prompt, completion, g in rows]
    return wholes, [token_ids(tokenizer, prompt, ask=True, given=g) for prompt, _, g in rows]


def note_repeated(split: Dataset, answer: str, name: str, notes: list[str]) -> None:
    """Adds a note where most answers begin with their prompt: then they are whole texts or chats, and each prompt is there twice.

    Args:
        answer: the column. name: of the split.
    """
    pairs = (
        (without_nulls(prompt), without_nulls(given))
        for prompt, given in zip(split["prompt"], split[answer], strict=True)
    )
    twice = sum(bool(prompt) and given[: len(prompt)] == prompt for prompt, given in pairs)
    if 2 * twice > len(split):
        notes.append(
            f"{name}: in {twice:,} of {len(split):,} rows {answer} begins with the prompt, which is then there twice; leave it out of one"
        )


def same_beginning(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many elements of both are the same from the beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def options_of(batch: dict[str, list], columns: tuple[str, ...], split: str, numbers: Sequence[int]) -> list[Options]:
    """What every row of a batch gives its chat template.

    Args:
        columns: those of `chats.CARRIED` that the rows have.
        numbers: of the rows, from 0.

    Raises:
        DataError: with split and row.
    """
    found = []
    for i, number in enumerate(numbers):
        try:
            found.append(options({column: batch[column][i] for column in columns}))
        except ValueError as e:
            raise DataError(f"{split}, row {number + 1}: {', '.join(columns)}: {e}") from e
    return found
