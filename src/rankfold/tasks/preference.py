"""The better of two answers: TRL's DPOTrainer on pairs of a chosen and a rejected completion, as texts or as chats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rankfold.errors import short
from rankfold.tasks.chats import Chat, carried, not_a_chat, tidy_all, without_nulls
from rankfold.tasks.completions import note_repeated, options_of, pairs_of_chats, pairs_of_texts, same_beginning
from rankfold.tasks.rows import DataError, Encoded, Rows, mapped
from rankfold.tasks.task import LOSS, SHARE, Metric, Task
from rankfold.text import examples

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

ASKED, IMPLICIT = ("prompt", "chosen", "rejected"), ("chosen", "rejected")


class Preference(Task):
    name = "preference"
    summary = "prompt in, the better of two answers out"
    kinds = (ASKED, IMPLICIT)
    foreign = ("labels", "classes", "packing", "loss_on")
    max_length = 1024
    keyed = "prompts"
    models = ("AutoModelForCausalLM",)
    peft_type = "CAUSAL_LM"
    metrics = {  # noqa: RUF012
        "accuracy": Metric(greater_is_better=True, logged_as="rewards/accuracies", bounds=SHARE),
        "margin": Metric(greater_is_better=True, logged_as="rewards/margins"),
        "loss": Metric(
            greater_is_better=False, of_rows=False, bounds=LOSS
        ),  # some of TRL's losses are not a mean over rows
    }
    fused_head = True
    passes = 2  # the model, then the reference
    pipeline = "text-generation"
    start = {  # noqa: RUF012
        "model": {"name": "smollm2-135m-instruct"},
        "data": {"source": "phoneme-preferences", "max_validation": 200, "max_test": 500},
        "method": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "training": {"max_steps": 50, "batch_size": 8, "learning_rate": 5e-4, "evaluate_every": 25, "seed": 0},
    }
    comparison = (
        """\
model: smollm2-135m-instruct
task: preference
data: {source: phoneme-preferences, max_train: 400, max_validation: 200, max_test: 500}
training: {max_steps: 50, batch_size: 8, warmup: 0.1, evaluate_every: 25, precision: bf16}
output: runs/compare-preferences
""",
        "2,442,240",
        "2460000",
    )

    def as_ours(self, split: Dataset, names: dict[str, str]) -> Dataset:
        columns = set(split.column_names)
        if {"prompt", "completion", "label"} <= columns and not set(IMPLICIT) <= columns:
            raise DataError(
                "these are single answers with a label, as for KTO, and preferences are learnt from pairs; give rows of "
                "prompt, chosen and rejected"
            )
        prompt, chosen = (names.get(role, role) for role in ASKED[:2])
        if not {prompt, chosen} <= columns or not (
            isinstance(split[0][prompt], str) and isinstance(split[0][chosen], list)
        ):
            return split
        # The prompt as text beside whole chats: they begin with it, or it is their first message.
        first = next(iter(split[0][chosen]), None)
        answers = isinstance(first, dict) and (first.get("role") or first.get("from")) in ("assistant", "gpt")
        if len(split[0][chosen]) > 1 and not answers:
            return split.remove_columns(prompt)
        return mapped(split, lambda row: {prompt: row[prompt] and [{"role": "user", "content": row[prompt]}]})

    def carried(self, split: Dataset, names: dict[str, str], kind: tuple[str, ...]) -> tuple[str, ...]:
        return carried(split, names.get("chosen", "chosen"))

    def advice(self, columns: list[str]) -> str:
        return "{prompt: ..., chosen: ..., rejected: ...}"

    def kind(self, columns: list[str], names: dict[str, str]) -> tuple[str, ...]:
        return IMPLICIT if names["prompt"] == "prompt" and "prompt" not in columns else super().kind(columns, names)

    def problem(self, value: Any, column: str, kind: tuple[str, ...]) -> str | None:
        if isinstance(value, str):
            return None
        if value is None:
            return "is missing; every row needs both answers, so remove the row or fill it"
        if not isinstance(value, list):
            return f"holds {short(value)}; it must be text, or a list of {{role, content}}"
        return not_a_chat(value)

    def tidy(self, split: Dataset, kind: tuple[str, ...], name: str, notes: list[str]) -> Dataset:
        if len({isinstance(split[0][column], str) for column in kind}) > 1:
            raise DataError(
                f"{name}: some of the columns {', '.join(kind)} are text and some are chats; make them alike"
            )
        split = tidy_all(split, kind)
        same = [i for i, (c, r) in enumerate(map(_answers, split)) if c == r]
        if len(same) == len(split):
            raise DataError(f"{name}: chosen and rejected are the same in every row, so there is nothing to prefer")
        if same:
            notes.append(
                f"{name}: {len(same):,} of {len(split):,} rows are left out, because chosen and rejected are the same "
                f"(row {examples([str(i + 1) for i in same])})"
            )
            split = split.select(sorted(set(range(len(split))) - set(same)))
        if kind == ASKED:
            note_repeated(split, "chosen", name, notes)
            return split
        split = mapped(split, _parted)
        if isinstance(split[0]["prompt"], list) and [] in (prompts := split["prompt"][:]):
            raise DataError(
                f"{name}, row {prompts.index([]) + 1}: chosen and rejected do not begin with the same message"
            )
        return split

    def key(self, row: Any, inputs: tuple[str, ...]) -> str:
        return super().key(row, ("prompt",))  # pairs of one prompt stay on one side

    def encode(self, rows: Rows, split: str, processor: Any, max_length: int | None, data: Any) -> Encoded:
        """Tokens as TRL's trainer makes them. It cuts them."""
        table = rows.splits[split]
        is_chat = not isinstance(table[0]["chosen"], str)
        if is_chat and processor.chat_template is None:
            raise DataError(
                "the rows are chats but the model's tokenizer has no chat template; take an instruct model, or give the rows "
                "as texts"
            )
        extra = tuple(column for column in rows.carried if column in table.column_names)

        def encode(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
            made: dict[str, list] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
            given = (options_of(batch, extra, split, numbers),) if is_chat else ()
            pairs: Any = pairs_of_chats if is_chat else pairs_of_texts
            better, asked = pairs(batch["prompt"], batch["chosen"], *given, processor)
            worse, _ = pairs(batch["prompt"], batch["rejected"], *given, processor)
            for number, c, r, prompt in zip(numbers, better, worse, asked, strict=True):
                begins = min(same_beginning(c, prompt), same_beginning(r, prompt))
                if not c[begins:] or not r[begins:] or c[begins:] == r[begins:]:
                    why = "chosen and rejected are the same tokens" if c == r else "an answer has no token"
                    raise DataError(f"{split}, row {number + 1}: {why}; remove the row")
                made["prompt_ids"].append(prompt[:begins])
                made["chosen_ids"].append(c[begins:])
                made["rejected_ids"].append(r[begins:])
            return made | {"first": [len(c) for c in better], "second": [len(r) for r in worse]}

        made = mapped(table, encode, batched=True, with_indices=True, remove_columns=table.column_names)
        return Encoded(made.remove_columns(["first", "second"]), made["first"][:], made["second"][:])

    def learnable(self, rows: Dataset, kept: slice) -> Sequence[int]:
        def cut(row: Any, answer: str) -> list[int]:
            return (row["prompt_ids"] + row[answer])[kept]

        return [i for i, row in enumerate(rows) if cut(row, "chosen_ids") != cut(row, "rejected_ids")]

    def trainer(self) -> type:
        from trl.trainer.dpo_trainer import DPOTrainer

        return DPOTrainer

    def arguments_class(self) -> type:
        from trl.trainer.dpo_config import DPOConfig

        return DPOConfig

    def arguments(self, data: Any, max_length: int | None) -> dict[str, Any]:
        return {"max_length": max_length}

    def unread(self, extra: dict[str, Any]) -> dict[str, str]:
        # DPO has a smoothing of its own and no label
        return {"label_smoothing_factor": "use label_smoothing"} if extra.get("label_smoothing_factor") else {}

    def scores(
        self, outputs: Sequence[Any], inputs: dict[str, Any], metric: str, trainer: Any
    ) -> tuple[Tensor, Tensor]:
        """Rewards as in Rafailov et al. 2023 (arXiv 2305.18290, section 4): β·log of the model's over the reference's
        probability. TRL's `ld_alpha` is left out."""
        import torch

        if len(outputs) == 1:  # training.extra: {precompute_ref_log_probs: true}; summed as TRL summed those
            model = outputs[0].log_probs.detach().sum(1)
            reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        else:
            model, reference = (output.log_probs.detach().double().sum(1) for output in outputs)
        chosen, rejected = (trainer.args.beta * (model - reference)).chunk(2)
        value = (chosen > rejected).double() if metric == "accuracy" else chosen - rejected
        return value, torch.ones_like(value)


def _answers(row: Any) -> tuple[str | Chat, str | Chat]:
    """Chosen and rejected, to be compared: Arrow gives the messages of both columns keys of their own."""
    chosen, rejected = (
        part if isinstance(part, str) else without_nulls(part) for part in (row["chosen"], row["rejected"])
    )
    return chosen, rejected


def _parted(row: dict[str, Any]) -> dict[str, Any]:
    """The prompt that both answers begin with: whole messages, or whole words of a text."""
    chosen, rejected = _answers(row)
    begins = same_beginning(chosen, rejected)
    longer = max(chosen, rejected, key=len)
    while begins and isinstance(longer, str) and not longer[begins].isspace():
        begins -= 1
    return {"prompt": chosen[:begins], "chosen": chosen[begins:], "rejected": rejected[begins:]}


TASK = Preference()
