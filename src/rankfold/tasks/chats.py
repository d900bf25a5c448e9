"""Chats as training rows: what is a chat, and which of its tokens the model should learn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

from rankfold.errors import nearest, short
from rankfold.tasks.rows import DataError, mapped

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant", "tool", "developer")

ALIASES = {"human": "user", "gpt": "assistant"}
"""What ShareGPT calls them."""

Chat = list[dict[str, Any]]
Options = dict[str, Any]
"""What a row gives its chat template beside the messages: tools, and variables of the template's own."""

CARRIED = ("tools", "chat_template_kwargs")


def options(row: dict[str, Any]) -> Options:
    """The options in the columns `CARRIED`, which hold JSON or what was read from it.

    Raises:
        ValueError: text that is not JSON, or tools that are not a list, or variables that are not a mapping.
    """
    tools, variables = (_plain(row.get(column)) for column in CARRIED)
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"tools must be a list, got {short(tools)}")
    if variables is not None and not isinstance(variables, dict):
        raise ValueError(f"chat_template_kwargs must be a mapping, got {short(variables)}")
    return ({"tools": tools} if tools else {}) | (variables or {})


def _plain(value: Any, inside: bool = False) -> Any:
    """JSON read, and without the nulls that Arrow puts where other rows have a key; texts inside stay what they are."""
    if isinstance(value, str) and not inside:
        return json.loads(value) if value.strip() else None
    if isinstance(value, dict):
        return {key: _plain(part, inside=True) for key, part in value.items() if part is not None}
    return [_plain(part, inside=True) for part in value] if isinstance(value, list) else value


def without_nulls(chat: Chat) -> Chat:
    """Messages without the keys that Arrow gives them because another message has them; as deep as they go, where transformers
    drops those of a message alone."""
    return _plain(chat, inside=True)


def tidy(chat: Chat) -> Chat:
    """Messages as {role, content}, those of {from, value} too."""
    return [
        {
            TO_OURS.get(key, key): ALIASES.get(part, part) if key in ("role", "from") else part
            for key, part in m.items()
            if part is not None  # Arrow gives a message of one form the keys of the other
        }
        for m in chat
    ]


def tidy_all(split: Dataset, columns: Iterable[str]) -> Dataset:
    """The rows with those of the columns that hold chats tidied."""
    chats = [column for column in columns if isinstance(split[0][column], list)]
    return mapped(split, lambda row: {column: tidy(row[column]) for column in chats}) if chats else split


def carried(split: Dataset, column: str) -> tuple[str, ...]:
    """Which of `CARRIED` the rows have, if the column holds chats."""
    if column not in split.column_names or isinstance(split[0][column], str):
        return ()
    return tuple(name for name in CARRIED if name in split.column_names)


TO_OURS = {"from": "role", "value": "content"}


def not_a_chat(value: Any) -> str | None:
    """What is wrong with one chat, as the end of a sentence, or None."""
    if not isinstance(value, list) or not value:
        return f"must be a list of {{role, content}}, got {short(value)}"
    for message in value:
        given = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
        role, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
        if role is None:
            return f"has a message without a role: {short(message)}"
        if role not in ROLES and role not in ALIASES:
            return f"has the role '{role}'{nearest(role, ROLES, 'known')}"
        if content is None and not any(given[key] for key in given.keys() - {"role", "from"}):
            return f"has a message that says nothing: {short(message)}"
        if not isinstance(content, str | list | None):
            return f"has the content {short(content)}, not text"
    return None


def token_ids(
    tokenizer: PreTrainedTokenizerBase, *parts: Chat, ask: bool = False, given: Options | None = None
) -> list[int]:
    """The tokens of a chat in one or more parts; `ask` adds the beginning of the answer that is asked for."""
    return list(_rendered(tokenizer, list(chain(*parts)), add_generation_prompt=ask, return_dict=False, **given or {}))


def _rendered(tokenizer: PreTrainedTokenizerBase, chat: Chat, **options: Any) -> Any:
    """What the tokenizer makes of a chat.

    Raises:
        DataError: its template refuses the chat, such as one with a system message.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(without_nulls(chat), tokenize=True, **options)
    except (TemplateError, TypeError) as e:
        raise DataError(
            f"the tokenizer's chat template does not take the chat {short(chat)}: {e}; change the row, or take another model"
        ) from e


def turns(tokenizer: PreTrainedTokenizerBase) -> Callable[[Chat, Options], tuple[list[int], list[bool]]]:
    """What finds the tokens of a chat, and for each whether it belongs to a turn of the assistant.

    By the marks of the chat template or of TRL's version of it, else by what the template adds when a message is given.
    """
    try:
        template = _marked(tokenizer)
    except ValueError:
        return lambda chat, given=None: turns_by_difference(chat, tokenizer, given)

    def by_marks(chat: Chat, given: Options | None = None) -> tuple[list[int], list[bool]]:
        marked = {"return_dict": True, "return_assistant_tokens_mask": True}
        found = _rendered(tokenizer, chat, chat_template=template, **marked, **given or {})
        return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]

    return by_marks


def _marked(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """TRL's version of the chat template, which marks the assistant's turns; None where it marks them itself.

    Raises:
        ValueError: neither.
    """
    from trl.chat_template_utils import get_training_chat_template

    return get_training_chat_template(tokenizer)


def leaves_out_the_end(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template marks the assistant's turns without their end, so that nothing teaches a model to stop."""
    from trl.chat_template_utils import is_chat_template_stop_token_trained

    try:
        return not is_chat_template_stop_token_trained(tokenizer, _marked(tokenizer))
    except ValueError:
        return False


def turns_by_difference(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, given: Options | None = None
) -> tuple[list[int], list[bool]]:
    """As `turns`, for templates without marks.

    A turn is what the template adds when the message is given instead of asked for. That needs a template which never
    rewrites what came before.

    Raises:
        DataError: the template does.
    """
    whole = token_ids(tokenizer, chat, given=given)
    learnt = [False] * len(whole)
    for i, message in enumerate(chat):
        if message["role"] == "assistant":
            asked = token_ids(tokenizer, chat[:i], ask=True, given=given)
            answered = token_ids(tokenizer, chat[: i + 1], given=given)
            if answered[: len(asked)] != asked or whole[: len(answered)] != answered:
                raise DataError(
                    "the tokenizer's chat template rewrites earlier turns, so the assistant's cannot be told apart; "
                    "use data.loss_on: all, or give the rows as prompt and completion"
                )
            learnt[len(asked) : len(answered)] = [True] * (len(answered) - len(asked))
    return whole, learnt
