"""The run file in the words of transformers' TrainingArguments and TRL's SFTConfig."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankfold.runfile.schema import RunFile, Task

LOGGED_AS = {"token_accuracy": "mean_token_accuracy"}
"""Our metrics that the trainer logs under another name."""


def arguments_class(task: Task) -> type:
    """The class whose keyword arguments `training.extra` may set."""
    if task == "classification":
        from transformers import TrainingArguments

        return TrainingArguments
    from trl.trainer.sft_config import SFTConfig

    return SFTConfig


def trainer_arguments(
    run: RunFile, *, validated: bool, kind: tuple[str, ...] = (), max_length: int | None = None
) -> dict[str, Any]:
    """Keyword arguments for `arguments_class`.

    Args:
        validated: there are validation rows.
        kind: the columns of the rows, which say what the loss of a language model can be taken on.
    """
    t = run.training
    every: dict[str, Any] = {"strategy": "epoch"}
    if t.evaluate_every != "epoch":
        every = {"strategy": "steps", "steps": t.evaluate_every}
    arguments: dict[str, Any] = {
        "output_dir": str(Path(run.output, "checkpoints")),
        "num_train_epochs": t.epochs or 3.0,
        "max_steps": t.max_steps or -1,
        "per_device_train_batch_size": t.batch_size,
        "per_device_eval_batch_size": t.eval_batch_size or t.batch_size,
        "gradient_accumulation_steps": t.gradient_accumulation,
        _checkpointing(): t.gradient_checkpointing,
        "learning_rate": t.learning_rate,
        "lr_scheduler_type": t.schedule,
        "warmup_steps": t.warmup,
        "optim": t.optimizer,
        "weight_decay": t.weight_decay,
        "max_grad_norm": t.max_grad_norm,
        "bf16": t.precision == "bf16",
        "fp16": t.precision == "fp16",
        "seed": t.seed,
        "full_determinism": t.deterministic,
        "logging_steps": t.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # a NaN is an error here, not a value to leave out
        "report_to": t.report_to,
        "include_num_input_tokens_seen": "non_padding",
        "save_total_limit": t.keep_checkpoints,
        "eval_strategy": "no",
        **{f"save_{key}": value for key, value in every.items()},
    }
    if validated:
        arguments |= {f"eval_{key}": value for key, value in every.items()}
        arguments |= {
            "load_best_model_at_end": run.keeps_best,
            "metric_for_best_model": f"eval_{LOGGED_AS.get(run.metric, run.metric)}",
            "greater_is_better": run.greater_is_better,
        }
    if run.task == "causal-lm":
        on_completion = run.data.loss_on == "completion"
        arguments |= {
            "max_length": max_length,
            "packing": run.data.packing,
            "eval_packing": False,  # every row counts once
            "completion_only_loss": on_completion and kind == ("prompt", "completion"),
            "assistant_only_loss": on_completion and kind == ("messages",),
        }
    else:
        # PEFT wraps the model, so Trainer cannot read the label's name off its forward.
        arguments |= {"label_names": ["labels"]}
    return arguments


def _checkpointing() -> str:
    """transformers renames the argument in 5.23 and warns of the old name."""
    from transformers import TrainingArguments

    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    return "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
