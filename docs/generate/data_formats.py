"""One row of every form that the tasks take; tests/docs/test_data_formats.py reads each of them as a run does."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from generate.markdown import fence, page


@dataclass(frozen=True)
class Form:
    """One form of rows: the task that takes it, a word on it, and rows as they stand in a JSONL file."""

    title: str
    task: str
    about: str
    rows: list[dict[str, Any]]
    columns: dict[str, str] = field(default_factory=dict)


_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}

FORMS = (
    Form(
        "Prompt and completion",
        "causal-lm",
        "The completion is learnt, from the first token that differs from the prompt's; `data.loss_on: all` learns both. Both may also be "
        "chats, lists of `{role, content}`.",
        [{"prompt": "Translate to French: sea\n", "completion": "mer"}],
    ),
    Form(
        "Chat",
        "causal-lm",
        "The assistant's turns are learnt. The model's tokenizer must have a chat template. Roles: system, user, assistant, tool, developer.",
        [
            {
                "messages": [
                    {"role": "system", "content": "Answer briefly."},
                    {"role": "user", "content": "What is the capital of Peru?"},
                    {"role": "assistant", "content": "Lima."},
                ]
            }
        ],
    ),
    Form(
        "Tools",
        "causal-lm",
        "A chat with a column `tools`: a list of JSON schemas, or that list as JSON text. It reaches the chat template, and so does "
        "`chat_template_kwargs`, a mapping of the template's own variables.",
        [
            {
                "messages": [
                    {"role": "user", "content": "Is it raining in Lima?"},
                    {"role": "assistant", "content": '{"name": "weather", "arguments": {"city": "Lima"}}'},
                    {"role": "tool", "content": "dry, 19 degrees"},
                    {"role": "assistant", "content": "No, it is dry."},
                ],
                "tools": [_WEATHER],
            }
        ],
    ),
    Form("Text", "causal-lm", "Every token is learnt, and the end of the text.", [{"text": "The sea is salt."}]),
    Form(
        "Alpaca",
        "causal-lm",
        "`instruction`, `output` and perhaps `input` become a chat of two messages; `input` follows the instruction after an empty line.",
        [{"instruction": "Translate to French.", "input": "sea", "output": "mer"}],
    ),
    Form(
        "ShareGPT",
        "causal-lm",
        "`conversations` of `{from, value}` become messages; `human` is the user and `gpt` the assistant.",
        [{"conversations": [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "4."}]}],
    ),
    Form(
        "Preference",
        "preference",
        "The better and the worse of two answers to one prompt, as texts or as chats. Without `prompt`, it is what both answers begin with.",
        [{"prompt": "Name a prime number.\n", "chosen": "7", "rejected": "8"}],
    ),
    Form(
        "Preference, chats",
        "preference",
        "Whole chats without a prompt, as UltraFeedback has them; a prompt as text beside whole chats is taken too.",
        [
            {
                "chosen": [{"role": "user", "content": "Name a prime."}, {"role": "assistant", "content": "7"}],
                "rejected": [{"role": "user", "content": "Name a prime."}, {"role": "assistant", "content": "8"}],
            }
        ],
    ),
    Form(
        "Classes of texts",
        "classification",
        "A label is text or a whole number. In CSV and TSV files every value is text.",
        [{"text": "A fine film.", "label": "positive"}, {"text": "Two hours lost.", "label": "negative"}],
    ),
    Form(
        "Classes of pairs of texts",
        "classification",
        "The second text must be named.",
        [
            {"text": "It rains.", "hypothesis": "It is wet.", "label": "follows"},
            {"text": "It rains.", "hypothesis": "It is dry.", "label": "contradicts"},
        ],
        {"text_pair": "hypothesis"},
    ),
    Form(
        "Tags",
        "token-classification",
        "A tag for each word. The columns `tokens` and one that ends in `_tags` are known too. Lists need JSONL, JSON or Parquet.",
        [{"words": ["Ada", "Lovelace", "met", "him"], "tags": ["B-PER", "I-PER", "O", "O"]}],
    ),
    Form(
        "Images",
        "image-classification",
        "A path as seen from the file, or the bytes of an image file in Parquet. A folder with a folder of images per class needs no file of rows: "
        "`pictures/train/cat/1.png`.",
        [{"image": "cat/1.png", "label": "cat"}, {"image": "dog/1.png", "label": "dog"}],
    ),
)

REFUSED = (
    ("KTO: `prompt`, `completion`, and a `label` that is false in some rows", "the undesired answers would be learnt like the others; keep the rows whose label is true"),
    ("`chosen` and `rejected` under `task: causal-lm`", "use `task: preference`, or learn the chosen answers alone with `data.columns`"),
    ("images or audio inside chats", "not taken; no task trains on them"),
    ("a CSV file with lists (chats, words, tags)", "use JSONL or Parquet"),
)  # fmt: skip


def data_formats() -> str:
    parts = []
    for form in FORMS:
        named = (
            f" With `data.columns: {{{', '.join(f'{k}: {v}' for k, v in form.columns.items())}}}`."
            if form.columns
            else ""
        )
        parts += [
            f"## {form.title}",
            f"`task: {form.task}`. {form.about}{named}",
            fence("\n".join(json.dumps(row) for row in form.rows), "json"),
        ]
    refused = "\n".join(f"* {what}: {why}." for what, why in REFUSED)
    return page(
        "Data formats",
        "docs/generate/data_formats.py",
        "One example of every form of rows that a run takes. Each of them is read by a test as a run reads it. Files are JSONL, JSON (a list), CSV, TSV "
        "or Parquet; a folder with `train.jsonl`, `validation.jsonl` and `test.jsonl` (of any of these formats) gives all splits. `data.columns` says "
        "what your columns are called where they differ. What a run does with the rows: [tasks](../tasks.md).",
        *parts,
        "## What is refused",
        refused,
    )
