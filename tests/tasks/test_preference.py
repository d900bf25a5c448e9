"""Pairs of answers: the tokens are TRL's, implicit prompts are found, and rows that teach nothing are named."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import byte_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from rankfold.io.adapters import read_tensors
from rankfold.runfile.load import parse
from rankfold.tasks import table
from rankfold.tasks.rows import DataError, Rows
from rankfold.train.data import load_rows
from rankfold.train.prepare import make_plan, prepare
from rankfold.train.run import train
from rankfold.train.trainers import careful

TASK = table.get("preference")
USER, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "Is it?"), ("assistant", "Yes."), ("assistant", "No!"))
)


def load(rows: list[dict[str, Any]], folder: Path, **data: Any) -> Rows:
    source = str(write_jsonl(folder / "rows.jsonl", rows))
    values = {"task": TASK.name, "model": "-", "method": "lora", "output": "-", "data": {"source": source, **data}}
    return load_rows(parse(values))


PLAIN = {"prompt": "Is it?", "chosen": " Yes.", "rejected": " No!"}
FORMS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "implicit": {"chosen": "Human: Is it? Bot: yes it is", "rejected": "Human: Is it? Bot: yesterday it was"},
    "chat": {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    "implicit chat": {"chosen": [USER, YES], "rejected": [USER, NO]},
}


@pytest.mark.parametrize("form", [name for name in FORMS if name != "implicit"])
def test_tokens_are_those_of_trl(form: str, llama: Path, tmp_path: Path):
    row, tokenizer = FORMS[form], byte_tokenizer()
    mine = TASK.encode(load([row, row], tmp_path), "train", tokenizer, None, None)
    args = DPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, max_length=None, report_to=[], activation_checkpointing=False
    )
    model = AutoModelForCausalLM.from_pretrained(llama)
    theirs = DPOTrainer(
        model,
        AutoModelForCausalLM.from_pretrained(llama),
        args,
        train_dataset=Dataset.from_list([row]),
        processing_class=tokenizer,
    )
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert mine.rows[0][column] == theirs.train_dataset[0][column]
    assert mine.lengths[0] == len(mine.rows[0]["prompt_ids"]) + len(mine.rows[0]["chosen_ids"])
    assert mine.second[0] == len(mine.rows[0]["prompt_ids"]) + len(mine.rows[0]["rejected_ids"])


def test_an_implicit_prompt_ends_with_a_whole_word(tmp_path: Path):
    same = {"chosen": "a b c", "rejected": "a b"}
    rows = load([FORMS["implicit"], same], tmp_path).splits["train"]
    assert rows[0] == {"prompt": "Human: Is it? Bot:", "chosen": " yes it is", "rejected": " yesterday it was"}
    assert rows[1] == {"prompt": "a b", "chosen": " c", "rejected": ""}


@pytest.mark.parametrize("chat", [[USER, YES], [YES]])
def test_the_prompt_as_text_beside_chats(chat: list[dict[str, Any]], tmp_path: Path):
    """As in UltraFeedback: the chats begin with the prompt, or are the answers alone."""
    row = {"prompt": "Is it?", "chosen": chat, "rejected": [*chat[:-1], NO]}
    found = load([row, row], tmp_path).splits["train"][0]
    assert (found["prompt"], found["chosen"], found["rejected"]) == ([USER], [YES], [NO])


def test_the_prompt_as_text_beside_answers_of_several_messages(tmp_path: Path):
    call = {"role": "tool", "content": "42"}
    row = {"prompt": "Is it?", "chosen": [YES, call, YES], "rejected": [YES, call, NO]}
    assert load([row], tmp_path).splits["train"][0] == row | {"prompt": [USER]}


@pytest.mark.parametrize("form", ["plain", "chat"])
def test_answers_that_begin_with_their_prompt_are_counted(form: str, tmp_path: Path):
    row = FORMS[form]
    whole = row | {answer: row["prompt"] + row[answer] for answer in ("chosen", "rejected")}
    assert load([row, row, whole], tmp_path).notes == []
    (note,) = load([row, whole, whole], tmp_path).notes
    assert note.startswith("train: in 2 of 3 rows chosen begins with the prompt, which is then there twice")


def test_other_names(tmp_path: Path):
    row = {"question": "q", "good": " a", "bad": " b"}
    rows = load([row, row], tmp_path, columns={"prompt": "question", "chosen": "good", "rejected": "bad"})
    assert rows.splits["train"][0] == {"prompt": "q", "chosen": " a", "rejected": " b"}


def test_pairs_of_one_prompt_stay_on_one_side(tmp_path: Path):
    rows = load(
        [{"prompt": f"p{i // 4}", "chosen": f" {i}", "rejected": " x"} for i in range(80)], tmp_path, validation=0.3
    )
    there, held = (set(rows.splits[name]["prompt"]) for name in ("train", "validation"))
    assert there
    assert held
    assert not there & held
    twice = load([PLAIN], tmp_path, validation=str(write_jsonl(tmp_path / "v.jsonl", [PLAIN | {"chosen": " Oh."}])))
    assert "validation: 1 of 1 prompts also occur in train; scores on them show memory, not learning" in twice.notes


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PLAIN, "chosen": None}, "train, row 2: column 'chosen' is missing; every row needs both answers"),
        ({**PLAIN, "rejected": None}, "train, row 2: column 'rejected' is missing"),
    ],
)  # fmt: skip
def test_missing_answers(row: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(DataError, match=message):
        load([PLAIN, row], tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r"none of the columns prompt \+ chosen \+ rejected, or chosen \+ rejected; it has: prompt"),
        ({"prompt": "a", "completion": "b", "label": True}, "single answers with a label, as for KTO"),
        ({"prompt": [USER], "chosen": "Yes.", "rejected": "No."}, "some of the columns prompt, chosen, rejected are text and some"),
        ({"prompt": "a", "chosen": 1, "rejected": 2}, r"column 'chosen' holds 1; it must be text, or a list of \{role, content\}"),
        ({"prompt": [USER], "chosen": [{"content": "x"}], "rejected": [NO]}, "column 'chosen' has a message without a role"),
        ({"chosen": [YES], "rejected": [NO]}, "train, row 1: chosen and rejected do not begin with the same message"),
        ({**PLAIN, "rejected": " Yes."}, "train: chosen and rejected are the same in every row"),
    ],
)  # fmt: skip
def test_rows_that_are_no_pairs(row: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(DataError, match=message):
        load([row, row], tmp_path)


def test_equal_answers_are_left_out_and_named(tmp_path: Path):
    rows = load([PLAIN, PLAIN | {"rejected": " Yes."}, PLAIN], tmp_path)
    assert len(rows.splits["train"]) == 2
    assert rows.notes == ["train: 1 of 3 rows are left out, because chosen and rejected are the same (row 2)"]


def test_answers_are_compared_without_the_nulls_of_parquet(tmp_path: Path):
    """The messages of one column have keys that those of the other have not."""
    called = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    rows = [{"chosen": [USER, YES], "rejected": [USER, answer]} for answer in (called, NO, YES)]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    found = load([], tmp_path, source=str(tmp_path / "rows.parquet"))
    assert found.splits["train"]["prompt"][:] == [[USER], [USER]]
    assert found.notes == ["train: 1 of 3 rows are left out, because chosen and rejected are the same (row 3)"]


def test_pairs_that_are_equal_within_max_length_are_left_out(llama: Path, tmp_path: Path):
    long = {"prompt": "p", "chosen": " the same and more", "rejected": " the same and less"}
    source = write_jsonl(tmp_path / "rows.jsonl", [PLAIN, long, PLAIN])
    values = {
        "task": TASK.name,
        "model": str(llama),
        "method": {"name": "lora", "target_modules": ["q_proj"]},
        "data": {"source": str(source), "max_length": 14},
        "output": "-",
    }
    prepared = prepare(parse(values))
    assert len(prepared.encoded["train"].rows) == 2
    (note,) = prepared.rows.notes
    assert note.startswith(
        "train: 1 of 3 rows are left out, because within 14 tokens they have nothing to learn (row 2)"
    )
    plan = make_plan(prepared)
    assert plan.tokens == 3 * 2 * (
        len("Is it? Yes.") + len("Is it? No!") + 2
    )  # three epochs, both answers with their ends


def test_row_scores_are_rewards():
    """β·(log-probability of the model less the reference's), by hand; padding and prompts have none."""
    model = SimpleNamespace(log_probs=torch.tensor([[0.0, -1, -2], [0, -1, 0], [0, -4, 0], [0, -1, -1]]))
    reference = SimpleNamespace(log_probs=torch.tensor([[0.0, -2, -2], [0, 0, 0], [0, -3, 0], [0, -1, -2]]))
    trainer: Any = SimpleNamespace(args=SimpleNamespace(beta=0.5))
    margin, weights = TASK.scores([model, reference], {}, "margin", trainer)
    assert margin.tolist() == [0.5 * (1 - -1), 0.5 * (-1 - 1)]
    assert TASK.scores([model, reference], {}, "accuracy", trainer)[0].tolist() == [1, 0]
    assert weights.tolist() == [1, 1]
    sums = reference.log_probs.sum(1).chunk(2)
    before_training = {"ref_chosen_logps": sums[0], "ref_rejected_logps": sums[1]}  # where TRL makes them once
    assert TASK.scores([model], before_training, "margin", trainer)[0].tolist() == margin.tolist()


def test_tokens_are_not_made_again(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """TRL's trainer takes the rows as they are, in training and for rows that it is given to evaluate."""
    monkeypatch.setattr(DPOTrainer, "_prepare_dataset", lambda *_, **__: pytest.fail("tokenised again"))
    assert issubclass(careful(DPOTrainer), DPOTrainer)
    source = write_jsonl(tmp_path / "rows.jsonl", [PLAIN | {"prompt": f"{i}?"} for i in range(12)])
    values = {
        "task": TASK.name,
        "model": str(llama),
        "method": {"name": "lora", "r": 2, "target_modules": ["q_proj"]},
        "data": {"source": str(source), "test": 0.3},
        "training": {"max_steps": 2, "batch_size": 2},
        "output": str(tmp_path / "run"),
    }
    assert train(parse(values), say=lambda _: None).after.keys() == {"accuracy", "margin", "loss"}


def test_a_schedule_resumes_beside_its_reference(llama: Path, tmp_path: Path):
    """Killed while ranks are cut; the reference lies in the checkpoint too."""
    source = write_jsonl(tmp_path / "rows.jsonl", [PLAIN | {"prompt": f"{i}?"} for i in range(24)])
    schedule = {"r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1}
    values: dict[str, Any] = {
        "task": TASK.name,
        "model": str(llama),
        "method": {"name": "adalora", "target_modules": ["q_proj", "v_proj"], **schedule},
        "data": {"source": str(source), "test": 0.3},
        "training": {"max_steps": 8, "batch_size": 4, "learning_rate": 0.05, "evaluate_every": 4},
    }

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                raise KeyboardInterrupt

    whole = train(parse(values, [f"output={tmp_path / 'whole'}"]), say=lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        train(parse(values, [f"output={tmp_path / 'killed'}"]), say=lambda _: None, callbacks=[Kill()])
    resumed = train(parse(values, [f"output={tmp_path / 'killed'}"]), resume=True, say=lambda _: None)
    assert (resumed.resumed_at, resumed.ranks, resumed.ranks_at_start) == (4, 2 * 4, 4 * 4)
    assert resumed.after == whole.after
    one, two = (read_tensors(result.adapter_path) for result in (whole, resumed))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_reference_of_a_run_is_the_adapter_it_starts_from(llama: Path, tmp_path: Path):
    """First learnt from texts, then from preferences: the loss begins at log 2, and only one adapter is saved."""
    source = write_jsonl(tmp_path / "rows.jsonl", [PLAIN | {"prompt": f"{i}?"} for i in range(12)])
    values: dict[str, Any] = {
        "task": "causal-lm",
        "model": str(llama),
        "method": {"name": "sora", "r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.2},
        "data": {"source": str(source), "columns": {"completion": "chosen"}},
        "training": {"max_steps": 4, "batch_size": 4, "learning_rate": 0.1, "log_every": 1},
        "output": str(tmp_path / "texts"),
    }
    first = train(parse(values), say=lambda _: None)
    values |= {"task": TASK.name, "data": {"source": str(source), "test": 0.3}, "output": str(tmp_path / "pairs")}
    values["training"] |= {"start_from": str(first.adapter_path)}
    result = train(parse(values), say=lambda _: None)
    assert result.before["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert result.before["margin"] == pytest.approx(0, abs=1e-6)
    assert result.ranks_at_start == 2 * 2 * 2
    assert not (result.adapter_path / "ref").exists()
    assert not any(".ref." in key for key in read_tensors(result.adapter_path))
