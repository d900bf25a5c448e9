"""Texts as the tokens of a model, cut off where they are too long."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokens_of(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    pairs: list[str] | None = None,
    *,
    max_length: int | None,
    **options: Any,
) -> tuple[dict[str, list], list[int]]:
    """What the tokenizer makes of texts or pairs of texts, and how many tokens each had before it was cut off."""
    found: dict[str, list] = dict(tokenizer(texts, pairs, verbose=False, **options))  # pyright: ignore[reportArgumentType]
    lengths = [len(ids) for ids in found["input_ids"]]
    # Cutting is the tokenizer's own business (the last token stays, and of a pair the longer one is cut).
    long = [i for i, length in enumerate(lengths) if max_length is not None and length > max_length]
    if long:
        few, few_pairs = ([column[i] for i in long] if column else None for column in (texts, pairs))
        cut = tokenizer(few, few_pairs, verbose=False, truncation=True, max_length=max_length, **options)  # pyright: ignore[reportArgumentType]
        for name, values in cut.items():
            for i, value in zip(long, values, strict=True):
                found[name][i] = value
    return found, lengths
