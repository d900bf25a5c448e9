"""The tokens and labels that the trainer gets are those that TRL would have made of the rows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from tiny import byte_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from rankfold.tasks.causal_lm import TASK
from rankfold.tasks.rows import DataError, Rows
from rankfold.train.hf_api import make_arguments


def chat(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]


ROWS: dict[tuple[str, ...], list[Any]] = {
    ("text",): [{"text": f"line {i}"} for i in range(4)] + [{"text": "ended</s>"}],
    ("prompt", "completion"): [{"prompt": f"{i} and {i} is", "completion": f" {2 * i}"} for i in range(4)],
    ("completion", "prompt"): [{"prompt": chat(i)[:1], "completion": chat(i)[1:]} for i in range(4)],
    ("messages",): [{"messages": chat(i) * 2} for i in range(4)],
}


@pytest.mark.parametrize("columns", ROWS, ids="-".join)
@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_rows_are_those_of_trl(columns: tuple[str, ...], loss_on: str, llama: Path, tmp_path: Path):
    kind = tuple(sorted(columns, reverse=True))
    rows, tokenizer = Rows({"train": Dataset.from_list(ROWS[columns])}, kind), byte_tokenizer()
    ours = TASK.encode(rows, "train", tokenizer, 12, SimpleNamespace(loss_on=loss_on))
    assert ours.lengths == [len(ids) for ids in ours.rows["input_ids"]]

    def prepared(given: Dataset, **options: Any) -> list[dict[str, list[int]]]:
        fixed = {"max_length": 12, "use_cpu": True, "bf16": False, "report_to": "none", "dataloader_pin_memory": False}
        args = make_arguments(
            SFTConfig, {"output_dir": str(tmp_path), "gradient_checkpointing": False, **fixed, **options}
        )
        model = AutoModelForCausalLM.from_pretrained(llama)
        made = SFTTrainer(model, args=args, train_dataset=given, processing_class=tokenizer).train_dataset
        return made.select_columns(["input_ids", "labels"]).to_list()  # pyright: ignore

    answers = loss_on == "completion"
    theirs = prepared(
        rows.splits["train"],
        completion_only_loss=answers and kind == ("prompt", "completion"),
        assistant_only_loss=answers and kind == ("messages",),
    )
    assert prepared(ours.rows) == theirs


def test_a_chat_without_an_answer_has_a_number(llama: Path):
    rows = Rows({"train": Dataset.from_list([{"messages": chat(0)}, {"messages": chat(1)[:1]}])}, ("messages",))
    with pytest.raises(
        DataError, match=r"train, row 2: there is nothing to learn in it; remove it, or use data\.loss_on: all"
    ):
        TASK.encode(rows, "train", byte_tokenizer(), 12, SimpleNamespace(loss_on="completion"))


@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize("marked", [True, False])
def test_a_chat_that_the_template_refuses_is_shown(loss_on: str, marked: bool):
    tokenizer = byte_tokenizer()
    assert isinstance(tokenizer.chat_template, str)
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    plain = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer.chat_template = refusing + (tokenizer.chat_template if marked else plain)
    rows = Rows(
        {"train": Dataset.from_list([{"messages": [{"role": "system", "content": "Be."}, *chat(0)]}])}, ("messages",)
    )
    with pytest.raises(
        DataError, match=r"does not take the chat \[\{'role': 'system'.*: no system role; change the row"
    ):
        TASK.encode(rows, "train", tokenizer, 12, SimpleNamespace(loss_on=loss_on))


def test_turns_marked_without_their_end_are_named():
    tokenizer, rows = byte_tokenizer(), Rows({"train": Dataset.from_list([{"messages": chat(0)}])}, ("messages",))
    TASK.encode(rows, "train", tokenizer, 12, SimpleNamespace(loss_on="completion"))
    assert rows.notes == []
    assert isinstance(tokenizer.chat_template, str)
    end = " + eos_token }}{% endgeneration %}"
    assert end in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(end, " }}{% endgeneration %}{{ eos_token }}")
    TASK.encode(rows, "train", tokenizer, 12, SimpleNamespace(loss_on="all"))
    assert rows.notes == []
    TASK.encode(rows, "train", tokenizer, 12, SimpleNamespace(loss_on="completion"))
    (note,) = rows.notes
    assert note.startswith("train: the chat template marks the assistant's turns without the token that ends them")


@pytest.mark.parametrize("kind", [("text",), ("prompt", "completion")])
def test_a_text_with_its_beginning_has_it_once(kind: tuple[str, ...]):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    begin = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[begin])
    given = [{column: f"{start}ab" if column == kind[0] else "c" for column in kind} for start in ("<s>", "", "a<s>")]
    made = TASK.encode(
        Rows({"train": Dataset.from_list(given)}, kind), "train", tokenizer, 12, SimpleNamespace(loss_on="completion")
    )
    (first, second, third), labels = made.rows["input_ids"][:], made.rows["labels"][:]
    assert first == second == tokenizer(f"{''.join(given[1].values())}</s>")["input_ids"]
    assert labels[0] == labels[1]
    assert [at for at, token in enumerate(third) if token == begin[1]] == [0, 2]


def test_chats_need_a_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    rows = Rows({"train": Dataset.from_list([{"messages": chat(0)}])}, ("messages",))
    with pytest.raises(DataError, match="has no chat template"):
        TASK.encode(rows, "train", tokenizer, 12, SimpleNamespace(loss_on="completion"))
