"""Text in, text out: TRL's SFTTrainer on texts, on prompts with their completion, or on chats."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rankfold.errors import short
from rankfold.tasks.chats import carried, leaves_out_the_end, not_a_chat, tidy_all, token_ids, turns
from rankfold.tasks.completions import (
    note_repeated,
    options_of,
    pairs_of_chats,
    pairs_of_texts,
    same_beginning,
    whole_texts,
)
from rankfold.tasks.formats import advice, as_ours, refuse_undesired
from rankfold.tasks.rows import DataError, Encoded, Rows, mapped
from rankfold.tasks.task import LOSS, SHARE, Metric, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

CHAT, PAIR, TEXT = ("messages",), ("prompt", "completion"), ("text",)


class CausalLm(Task):
    name = "causal-lm"
    summary = "text in, text out"
    kinds = (CHAT, PAIR, TEXT)
    foreign = ("labels", "classes")
    max_length = 1024
    models = ("AutoModelForCausalLM",)
    peft_type = "CAUSAL_LM"
    metrics = {  # noqa: RUF012
        "loss": Metric(greater_is_better=False, bounds=LOSS),
        "token_accuracy": Metric(greater_is_better=True, logged_as="mean_token_accuracy", bounds=SHARE),
    }
    fused_head = True
    loss_of_labels = True
    weighted = True
    # The rows come as tokens with their labels, so TRL would not look at these.
    own_arguments = (
        "completion_only_loss",
        "assistant_only_loss",
        "chat_template_path",
        "eos_token",
        "dataset_text_field",
        "dataset_kwargs",
    )
    pipeline = "text-generation"
    counts_rows = False
    start = {  # noqa: RUF012
        "model": {"name": "smollm2-135m-instruct"},
        "data": {"source": "phonemes", "max_validation": 500, "max_test": 500},
        "method": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "training": {"max_steps": 100, "batch_size": 16, "learning_rate": 2e-3, "evaluate_every": 50, "seed": 0},
    }
    comparison = (
        """\
model: smollm2-135m-instruct
task: causal-lm
data: {source: phonemes, max_train: 1600, max_validation: 300, max_test: 600}
training: {max_steps: 100, batch_size: 16, warmup: 0.1, evaluate_every: 50, precision: bf16, metric: token_accuracy}
output: runs/compare-phonemes
""",
        "2,442,240",
        "2460000",
    )

    @property
    def heads(self) -> tuple[str, ...]:
        return (*super().heads, "LMHeadModel")  # as GPT-2's and XLM's are called

    def as_ours(self, split: Dataset, names: dict[str, str]) -> Dataset:
        if any(names.get(role, role) != role for role in self.columns):
            return split
        refuse_undesired(split)
        known = any(all(role in split.column_names for role in kind) for kind in self.kinds)
        return split if known else as_ours(split)

    def carried(self, split: Dataset, names: dict[str, str], kind: tuple[str, ...]) -> tuple[str, ...]:
        return carried(split, names.get(kind[0], kind[0]))

    def advice(self, columns: list[str]) -> str:
        return advice(columns)

    def problem(self, value: Any, column: str, kind: tuple[str, ...]) -> str | None:
        if isinstance(value, str) and kind != CHAT:
            return None
        if value is None and kind != TEXT:
            return "is missing"
        if kind == PAIR and not isinstance(value, list):
            return f"holds {short(value)}; it must be text, or a list of {{role, content}}"
        return f"holds {short(value)}, not text" if kind == TEXT else not_a_chat(value)

    def tidy(self, split: Dataset, kind: tuple[str, ...], name: str, notes: list[str]) -> Dataset:
        split = tidy_all(split, kind)
        if kind == PAIR:
            note_repeated(split, "completion", name, notes)
        return split

    def encode(self, rows: Rows, split: str, processor: Any, max_length: int | None, data: Any) -> Encoded:
        """Tokens, and as labels those of them that are to be learnt. TRL cuts and packs them."""
        table = rows.splits[split]
        is_chat = not isinstance(table[0][rows.kind[0]], str)
        if is_chat and processor.chat_template is None:
            raise DataError(
                "the rows are chats but the model's tokenizer has no chat template; take an instruct model, or give the rows "
                "as prompt and completion"
            )
        answers_only = data.loss_on == "completion"
        if split == "train" and rows.kind == CHAT and answers_only and leaves_out_the_end(processor):
            rows.notes.append(
                "train: the chat template marks the assistant's turns without the token that ends them, so the model does not learn "
                "to stop; move the token before {% endgeneration %}, or use data.loss_on: all"
            )
        tokens = _tokens_of(rows.kind, processor, is_chat, answers_only)
        # Of their own, so that what `datasets` takes a fingerprint of does not hold the rows
        kind, extra = rows.kind, tuple(column for column in rows.carried if column in table.column_names)

        def encode(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
            ids, labels = [], []
            columns = [batch[column] for column in kind]
            if is_chat:
                columns.append(options_of(batch, extra, split, numbers))
            for number, (row, learnt) in zip(numbers, tokens(*columns), strict=True):
                if not any(learnt):
                    raise DataError(
                        f"{split}, row {number + 1}: there is nothing to learn in it; remove it, or use data.loss_on: all"
                    )
                ids.append(row)
                labels.append([token if yes else -100 for token, yes in zip(row, learnt, strict=True)])
            return {"input_ids": ids, "labels": labels, "length": [len(row) for row in ids]}

        made = mapped(table, encode, batched=True, with_indices=True, remove_columns=table.column_names)
        return Encoded(made.remove_columns("length"), made["length"][:])

    def learnable(self, rows: Dataset, kept: slice) -> Sequence[int]:
        # Nothing predicts the first token.
        return [i for i, labels in enumerate(rows["labels"]) if any(label != -100 for label in labels[kept][1:])]

    def trainer(self) -> type:
        from trl.trainer.sft_trainer import SFTTrainer

        return SFTTrainer

    def arguments_class(self) -> type:
        from trl.trainer.sft_config import SFTConfig

        return SFTConfig

    def arguments(self, data: Any, max_length: int | None) -> dict[str, Any]:
        # Every row counts once in evaluation.
        return {"max_length": max_length, "packing": data.packing, "eval_packing": False}

    def unread(self, extra: dict[str, Any]) -> dict[str, str]:
        both = extra.get("label_smoothing_factor") and extra.get("loss_type") == "dft"
        return {"label_smoothing_factor": "remove it, or loss_type: dft"} if both else {}

    def scores(
        self, outputs: Sequence[Any], inputs: dict[str, Any], metric: str, trainer: Any
    ) -> tuple[Tensor, Tensor]:
        (output,) = outputs
        # TRL's fused head gives, per token and zero where no label is, what its own metrics are made of.
        tokens = output.label_mask.detach().double().sum(1)
        total = (output.is_top1 if metric == "token_accuracy" else -output.log_probs).detach().double().sum(1)
        return total / tokens.clamp(min=1), tokens


Learnt = tuple[list[int], list[bool]]
"""The tokens of a row, and for each whether it is to be learnt."""


def _tokens_of(
    kind: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, is_chat: bool, answers_only: bool
) -> Callable[..., Iterable[Learnt]]:
    """What turns the columns of a batch, and of chats the options, into its rows' tokens."""
    if kind == PAIR:
        wholes_and_prompts: Callable[..., tuple[Any, Any]] = pairs_of_chats if is_chat else pairs_of_texts
        return lambda *columns: (
            _behind(whole, prompt if answers_only else ())
            for whole, prompt in zip(*wholes_and_prompts(*columns, tokenizer), strict=True)
        )
    if kind == CHAT and answers_only:
        return functools.partial(map, turns(tokenizer))
    if kind == CHAT:
        return lambda chats, given: (
            _behind(token_ids(tokenizer, c, given=g), ()) for c, g in zip(chats, given, strict=True)
        )
    return lambda texts: (_behind(ids, ()) for ids in whole_texts(texts, tokenizer))


def _behind(whole: list[int], prompt: Sequence[int]) -> Learnt:
    """Learns what follows the prompt, from the first token that differs: a tokenizer may end the prompt differently when
    nothing follows."""
    begins = same_beginning(whole, prompt)
    return whole, [at >= begins for at in range(len(whole))]


TASK = CausalLm()
