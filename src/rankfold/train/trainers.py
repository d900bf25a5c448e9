"""The two trainers, transformers' and TRL's, made careful: no step after a loss that is no number, no half checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl.trainer.sft_trainer import SFTTrainer

from rankfold.control import AdapterCallback
from rankfold.errors import RankfoldError
from rankfold.train.arguments import arguments_class, trainer_arguments
from rankfold.train.callbacks import Progress, RankAllocation
from rankfold.train.folder import saving
from rankfold.train.loss import score_labels_only
from rankfold.train.metrics import classification_metrics
from rankfold.train.prepare import Prepared


class DivergedError(RankfoldError):
    """The loss is NaN or infinite; the message says at which step and what to try."""


class CarefulTrainer(Trainer):
    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not bool(torch.isfinite(loss)):
            # Before the optimiser's step, so the weights are still those of the last good one.
            raise DivergedError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; lower training.learning_rate "
                f"(now {self.args.learning_rate:g}), raise training.warmup, or try another training.precision"
            )
        return loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers asks only after a step whether to stop; a run that resumes where it had stopped has none to make.
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        checkpoint = Path(self.args.output_dir or ".", f"checkpoint-{self.state.global_step}")
        try:
            with saving(checkpoint):
                super()._save_checkpoint(model, trial)
        except Exception:
            shutil.rmtree(checkpoint, ignore_errors=True)
            raise


class CarefulSFTTrainer(CarefulTrainer, SFTTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model: Any = self.model
        score_labels_only(model.get_base_model() if isinstance(model, PeftModel) else model)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None in checkpoints: the run writes its own card."""


def make_trainer(prepared: Prepared, model: PeftModel, callbacks: list[TrainerCallback]) -> CarefulTrainer:
    """The trainer of the run's task, with the rows it trains and validates on."""
    run, rows = prepared.run, prepared.rows
    train, validation = prepared.for_trainer("train"), prepared.for_trainer("validation")
    # Rows that come with labels are no chats or completions to TRL any more.
    kind = () if train is not None and "labels" in train.column_names else rows.kind
    arguments = trainer_arguments(run, validated=validation is not None, kind=kind, max_length=prepared.max_length)
    # transformers wants to be told that a machine has no accelerator before it trains in bf16 there.
    arguments |= {"use_cpu": not torch.accelerator.is_available(), "dataloader_pin_memory": torch.cuda.is_available()}
    arguments |= run.training.extra
    options: dict[str, Any] = {
        "model": model,
        "args": arguments_class(run.task)(**arguments),
        "train_dataset": train,
        "eval_dataset": validation,
        "processing_class": prepared.tokenizer,
        "callbacks": [AdapterCallback(), *callbacks],
    }
    if run.task == "classification":
        trainer = CarefulTrainer(**options, compute_metrics=classification_metrics)
        # BERT's kind takes any keyword but means its loss over its own batch, so that Trainer, which believes that the
        # loss is divided by the rows of all batches, would multiply it by the accumulated batches or the processes.
        trainer.model_accepts_loss_kwargs = False
    else:
        trainer = CarefulSFTTrainer(**options)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress())
    if hasattr(model.base_model, "update_and_allocate"):
        trainer.add_callback(RankAllocation())
    return trainer
