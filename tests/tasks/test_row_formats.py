"""Rows as other trainers want them: Alpaca, ShareGPT, DPO, KTO, tools beside chats."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from tiny import byte_tokenizer, write_jsonl

from rankfold.runfile.load import parse
from rankfold.tasks.causal_lm import TASK
from rankfold.tasks.rows import DataError, Rows
from rankfold.train.data import load_rows


def load(tmp_path: Path, rows: list[dict[str, Any]], **data: Any) -> Rows:
    source = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    method = {"name": "lora", "r": 2}
    return load_rows(
        parse({"model": "m", "task": "causal-lm", "data": {"source": source, **data}, "method": method, "output": "o"})
    )


def texts(rows: Rows, tokenizer: Any = None, loss_on: str = "completion") -> list[tuple[str, str]]:
    """Of each row: all of it, and what is learnt."""
    tokenizer = tokenizer or byte_tokenizer()
    made = TASK.encode(rows, "train", tokenizer, 512, SimpleNamespace(loss_on=loss_on)).rows.to_list()
    return [
        (tokenizer.decode(row["input_ids"]), tokenizer.decode([i for i in row["labels"] if i != -100])) for row in made
    ]


def test_alpaca(tmp_path: Path):
    rows = load(
        tmp_path,
        [{"instruction": "Add", "input": "1 2", "output": "3"}, {"instruction": "Hi", "input": "", "output": "Ho"}],
    )
    assert texts(rows) == [
        ("<|user|>Add\n\n1 2<|assistant|>3</s>", "3</s>"),
        ("<|user|>Hi<|assistant|>Ho</s>", "Ho</s>"),
    ]
    named = load(
        tmp_path,
        [{"instruction": "a", "input": "b", "output": "c"}],
        columns={"prompt": "instruction", "completion": "output"},
    )
    assert named.notes == ["train: not used: the column input"]


def test_sharegpt(tmp_path: Path):
    chat = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert texts(load(tmp_path, [{"conversations": chat}])) == [
        ("s" and "<|system|>s<|user|>a<|assistant|>b</s>", "b</s>")
    ]


def test_completions_that_begin_with_their_prompt_are_counted(tmp_path: Path):
    rows = [{"prompt": "Double 2:", "completion": "Double 2: 4"}, {"prompt": "Double 3:", "completion": "Double 3: 6"}]
    (note,) = load(tmp_path, rows).notes
    assert (
        note
        == "train: in 2 of 2 rows completion begins with the prompt, which is then there twice; leave it out of one"
    )
    assert load(tmp_path, [rows[0], {"prompt": "", "completion": "x"}]).notes == [
        "train: 1 of 2 rows have an empty prompt"
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, r"rows of preferences .* data\.columns: \{completion: chosen\}"),
        ({"chosen": [{"role": "user", "content": "a"}], "rejected": []}, r"data\.columns: \{messages: chosen\}"),
        ({"prompt": "a", "completion": "b", "label": False}, "says false of 1 of 2 completions, as for KTO"),
        ({"question": "a", "answer": "b"}, r"instance data\.columns: \{prompt: question, completion: answer\}"),
        ({"title": "a", "body": "b"}, r"data\.columns: \{prompt: \.\.\., completion: \.\.\.\} or \{text: \.\.\.\}"),
        ({"body": "b"}, r"data\.columns: \{text: body\}"),
    ],
)  # fmt: skip
def test_refused_with_what_to_write(tmp_path: Path, row: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        load(tmp_path, [row, row | ({"label": True} if "label" in row else {})])


def test_the_advice_works(tmp_path: Path):
    rows = load(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}], columns={"completion": "chosen"})
    assert texts(rows) == [("ab</s>", "b</s>")]
    assert rows.notes == ["train: not used: the column rejected"]


TOOLS = (
    "{% if tools %}{% for t in tools %}[{{ t['name'] }}{% for k in t['args'] %} {{ k }}{% endfor %}]{% endfor %}{% endif %}"
    "{{ style }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("kind", ["messages", "pair"])
@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_tools_and_variables_reach_the_template(tmp_path: Path, kind: str, as_text: bool, loss_on: str):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOLS
    asked, answer = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    chat = {"messages": asked + answer} if kind == "messages" else {"prompt": asked, "completion": answer}
    given = [
        {"tools": [{"name": "f", "args": {"x": 1}}], "chat_template_kwargs": {"style": "S"}},
        {"tools": [{"name": "g", "args": {"y": 1}}], "chat_template_kwargs": {"style": ""}},
    ]
    rows = load(tmp_path, [chat | {k: json.dumps(v) if as_text else v for k, v in row.items()} for row in given])
    learnt = "b</s>" if loss_on == "completion" else None
    whole = ["[f x]S<|user|>a</s><|assistant|>b</s>", "[g y]<|user|>a</s><|assistant|>b</s>"]
    assert texts(rows, tokenizer, loss_on) == [(text, learnt or text) for text in whole]
    assert rows.notes == []


CALLS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% generation %}{% for c in m['tool_calls'] or [] %}"
    "{{ c['function']['name'] }}({{ c['function']['arguments'] | tojson }}){% endfor %}{{ m['content'] }}"
    "{{ '+' if 'tool_calls' in m else '' }}{{ eos_token }}{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("kind", ["messages", "pair"])
@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_nulls_of_parquet_are_not_trained_on(tmp_path: Path, kind: str, loss_on: str, marked: bool):
    """Arrow gives every message, and every part of one, the keys of all others."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        CALLS if marked else CALLS.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    )
    asked = [{"role": "user", "content": "a"}]
    answers: list[dict[str, Any]] = [
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {key: 1}}}]}
        for key in "xy"
    ]
    answers.append({"role": "assistant", "content": "b"})
    rows = [{"messages": [*asked, a]} if kind == "messages" else {"prompt": asked, "completion": [a]} for a in answers]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    found = texts(load(tmp_path, [{}], source=str(tmp_path / "rows.parquet")), tokenizer, loss_on)
    learnt = ['f({"x": 1})+</s>', 'f({"y": 1})+</s>', "b</s>"]
    whole = [f"<|user|>a</s><|assistant|>{text}" for text in learnt]
    if loss_on == "all":
        learnt = whole
    elif marked and kind == "messages":  # this template marks the user's turn too
        learnt = [f"a</s>{text}" for text in learnt]
    assert found == list(zip(whole, learnt, strict=True))


def test_bad_tools_have_a_row(tmp_path: Path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = load(tmp_path, [{"messages": chat, "tools": "[]"}, {"messages": chat, "tools": "{"}])
    with pytest.raises(DataError, match="train, row 2: tools: "):
        texts(rows)


def test_columns_that_are_not_used_are_named(tmp_path: Path):
    rows = load(tmp_path, [{"prompt": "a", "completion": "b", "tools": "[]", "id": 1}])
    assert rows.notes == ["train: not used: the columns tools, id"]
    assert Dataset.from_list([{"prompt": "a", "completion": "b"}]).to_list() == rows.splits["train"].to_list()
