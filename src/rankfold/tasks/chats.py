"""Chats as training rows: what is a chat, and which of its tokens the model should learn."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

from rankfold.errors import nearest, short
from rankfold.tasks.rows import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant", "tool", "developer")

Chat = list[dict[str, Any]]


def not_a_chat(value: Any) -> str | None:
    """What is wrong with one chat, as the end of a sentence, or None."""
    if not isinstance(value, list) or not value:
        return f"must be a list of {{role, content}}, got {short(value)}"
    for message in value:
        role = message.get("role", message.get("from")) if isinstance(message, dict) else None
        if role is None:
            return f"has a message without a role: {short(message)}"
        if role not in ROLES:
            return f"has the role '{role}'{nearest(role, ROLES, 'known')}"
    return None


def token_ids(tokenizer: PreTrainedTokenizerBase, *parts: Chat, ask: bool = False) -> list[int]:
    """The tokens of a chat in one or more parts; `ask` adds the beginning of the answer that is asked for."""
    chat = list(chain(*parts))
    ids: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=ask, tokenize=True, return_dict=False)
    return list(ids)


def turns(tokenizer: PreTrainedTokenizerBase) -> Callable[[Chat], tuple[list[int], list[bool]]]:
    """What finds the tokens of a chat, and for each whether it belongs to a turn of the assistant.

    By the marks of the chat template or of TRL's version of it, else by what the template adds when a message is given.
    """
    from trl.chat_template_utils import get_training_chat_template

    try:
        template = get_training_chat_template(tokenizer)
    except ValueError:  # neither marks nor a version of TRL's
        return lambda chat: turns_by_difference(chat, tokenizer)

    def by_marks(chat: Chat) -> tuple[list[int], list[bool]]:
        found: Any = tokenizer.apply_chat_template(
            chat, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]

    return by_marks


def turns_by_difference(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """As `turns`, for templates without marks.

    A turn is what the template adds when the message is given instead of asked for. That needs a template which never
    rewrites what came before.

    Raises:
        DataError: the template does.
    """
    whole = token_ids(tokenizer, chat)
    learnt = [False] * len(whole)
    for i, message in enumerate(chat):
        if message["role"] == "assistant":
            asked, answered = token_ids(tokenizer, chat[:i], ask=True), token_ids(tokenizer, chat[: i + 1])
            if answered[: len(asked)] != asked or whole[: len(answered)] != answered:
                raise DataError(
                    "the tokenizer's chat template rewrites earlier turns, so the assistant's cannot be told apart; "
                    "use data.loss_on: all, or give the rows as prompt and completion"
                )
            learnt[len(asked) : len(answered)] = [True] * (len(answered) - len(asked))
    return whole, learnt
