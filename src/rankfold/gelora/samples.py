"""Training inputs as the token batches that a measurement reads: drawn, encoded as in training, padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankfold.errors import RankfoldError
from rankfold.gelora.states import FEWEST
from rankfold.tasks.chats import without_nulls

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: One input as in training: a text; two (a pair, a prompt and its completion, or source and target of an encoder-decoder);
#: or a chat of {role, content}.
Sample = str | tuple[str, str] | list[dict[str, str]]


def longest(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    config = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None) or 1024
    if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert"):
        positions -= 1 + (config.pad_token_id or 0)  # pyright: ignore[reportOptionalMemberAccess]
    return min(1024, tokenizer.model_max_length, positions)


def draw(
    model: nn.Module, tokenizer: Any, texts: Sequence[Sample], points: int, seed: int, max_length: int
) -> list[dict[str, list[int]]]:
    """Different token sequences in random order; the shuffle depends on the number of texts and the seed alone."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    found: dict[tuple, dict[str, list[int]]] = {}
    for i in order:
        row = _encode(model, tokenizer, texts[i], max_length)
        if row["input_ids"]:
            found.setdefault(tuple(tuple(row[k]) for k in sorted(row)), row)
        if len(found) == points:
            break
    if len(found) < FEWEST:
        raise RankfoldError(
            f"texts: {len(found)} different ones are too few to measure a dimension; give {FEWEST} or more"
        )
    return list(found.values())


def pad_id(tokenizer: Any) -> int:
    """Any id will do where there is none: the mask keeps it out."""
    return tokenizer.pad_token_id or 0


def _encode(model: nn.Module, tokenizer: Any, sample: Sample, max_length: int) -> dict[str, list[int]]:
    both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    causal = tokenizer.sep_token is None or tokenizer.cls_token is None
    cut = {"truncation": True, "max_length": max_length}
    if both:
        if not isinstance(sample, (tuple, list)) or not all(isinstance(part, str) for part in sample):
            raise RankfoldError("texts: an encoder-decoder needs a pair of source and target per sample")
        source, target = sample
        row = dict(tokenizer(source, **cut))
        answer = tokenizer(text_target=target, **cut)["input_ids"]
        shifted = [model.config.decoder_start_token_id, *answer[:-1]]  # pyright: ignore[reportAttributeAccessIssue]
        return {**row, "decoder_input_ids": shifted, "decoder_attention_mask": [1] * len(shifted)}
    if isinstance(sample, list):
        ids = tokenizer.apply_chat_template(without_nulls(sample), tokenize=True, return_dict=False, **cut)
        return {"input_ids": list(ids), "attention_mask": [1] * len(ids)}
    if isinstance(sample, str):
        return dict(tokenizer(sample, **cut))
    return dict(tokenizer("".join(sample), **cut) if causal else tokenizer(*sample, **cut))


def batches(rows: Sequence[dict[str, list[int]]], batch_size: int, pad_id: int) -> Iterator[dict[str, Tensor]]:
    """Rows of like length together, padded on the right; the mask keeps padding out of the states that count."""
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        yield {key: _padded([row[key] for row in part], pad_id if key.endswith("input_ids") else 0) for key in part[0]}


def _padded(rows: Sequence[list[int]], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
