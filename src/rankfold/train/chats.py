"""Chats as training rows: what is a chat, and which of its tokens the model should learn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rankfold.runfile.problems import nearest, short
from rankfold.train.datafile import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant", "tool", "developer")


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


def template_marks_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Can TRL find the assistant's turns by this chat template, or by its own version of it?"""
    from trl.chat_template_utils import get_training_chat_template

    try:
        get_training_chat_template(tokenizer)
    except ValueError:
        return False
    return True


def with_labels(chats: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Token ids, and labels on the assistant's turns alone, for templates that do not mark them.

    A turn is what the template adds when the message is given instead of asked for. That needs a template which never
    rewrites what came before.

    Raises:
        DataError: the template does.
    """

    def ids(messages: list[dict[str, Any]], ask: bool = False) -> Any:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=ask, tokenize=True, return_dict=False)

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        messages = row["messages"]
        whole = ids(messages)
        labels = [-100] * len(whole)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                asked, answered = ids(messages[:i], ask=True), ids(messages[: i + 1])
                if answered[: len(asked)] != asked or whole[: len(answered)] != answered:
                    raise DataError(
                        "the tokenizer's chat template rewrites earlier turns, so the assistant's cannot be told apart; "
                        "use data.loss_on: all, or give the rows as prompt and completion"
                    )
                labels[len(asked) : len(answered)] = answered[len(asked) :]
        return {"input_ids": whole, "labels": labels}

    return chats.map(encode, remove_columns=chats.column_names)
