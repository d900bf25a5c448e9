"""The run file in the words of transformers' TrainingArguments and TRL's classes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rankfold.runfile.optimizers import clip_norm, row_of
from rankfold.runfile.schema import RunFile
from rankfold.tasks import table

RENAMED = {"gradient_checkpointing": "activation_checkpointing"}
"""Arguments by the name that every supported transformers understands, and the name that the newest ones want."""


def trainer_arguments(run: RunFile, *, validated: bool, max_length: int | None = None) -> dict[str, Any]:
    """Keyword arguments for the task's `arguments_class`, without `training.extra`; names as before `RENAMED`.

    Args:
        validated: there are validation rows.
        max_length: of a row in tokens.
    """
    t, task = run.training, table.get(run.task)
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
        "gradient_checkpointing": t.gradient_checkpointing,
        "learning_rate": t.learning_rate,
        "lr_scheduler_type": t.schedule,
        "warmup_steps": t.warmup,
        "optim": t.optimizer if row_of(t.optimizer) is None else "adamw_torch",  # one of ours is handed over as a class
        "weight_decay": t.weight_decay,
        "max_grad_norm": clip_norm(t),
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
            "metric_for_best_model": f"eval_{task.logged_as(run.metric)}",
            "greater_is_better": run.greater_is_better,
        }
    return arguments | task.arguments(run.data, max_length)
