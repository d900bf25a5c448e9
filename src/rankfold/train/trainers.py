"""The trainers of transformers and TRL, hardened: stop before stepping on a non-finite loss; never leave a partial checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from rankfold.control import AdapterCallback
from rankfold.errors import RankfoldError
from rankfold.tasks.task import Task
from rankfold.train.callbacks import NoStepTooMany, Progress, RankAllocation
from rankfold.train.folder import saving
from rankfold.train.hf_api import (
    StepwiseTrainer,
    add_terms_of_the_model,
    check_saves,
    log_means,
    loss_is_of_its_batch,
    make_arguments,
    make_optimizer_by,
    mend_loss_of_routers,
    require,
)
from rankfold.train.loss import score_as_the_model_does, score_labels_only
from rankfold.train.optimizer import RunOptimizer
from rankfold.train.prepare import Prepared
from rankfold.train.scores import Collector, RowScores


class DivergedError(RankfoldError):
    """The loss is NaN or infinite; the message says at which step and what to try."""


class CarefulTrainer(StepwiseTrainer):
    task: Task
    row_scores: dict[str, RowScores]
    """Of the rows evaluated last, by metric."""

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._rows = Collector(self.task, self)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self.row_scores = self._rows.scores()
        assert output.metrics is not None
        means = {self.task.logged_as(name): scores.mean for name, scores in self.row_scores.items()}
        log_means(self, output.metrics, metric_key_prefix, means)
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with self._rows.batch(inputs):
            return super().prediction_step(model, inputs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not bool(torch.isfinite(loss)):
            # Before the optimiser's step, so the weights are still those of the last good one.
            raise DivergedError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; lower training.learning_rate "
                f"(now {self.args.learning_rate:g}), raise training.warmup, or try another training.precision"
            )
        return loss

    @contextmanager
    def around_checkpoint(self, folder: Path) -> Iterator[None]:
        try:
            with saving(folder):
                yield
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None in checkpoints: the run writes its own card."""


def careful(trainer: type) -> type[CarefulTrainer]:
    """A trainer's class, transformers' own or one of TRL's, made a CarefulTrainer."""
    if trainer is Trainer:
        return CarefulTrainer
    require("trl", trainer, "_prepare_dataset")
    return type(f"Careful{trainer.__name__}", (CarefulTrainer, trainer), {})


def make_trainer(
    prepared: Prepared, model: PeftModel, callbacks: list[TrainerCallback], optimizer: RunOptimizer | None = None
) -> CarefulTrainer:
    """The trainer of the run's task, with the rows it trains and validates on.

    Args:
        optimizer: the run's, where it is one of rankfold's.
    """
    task = prepared.task
    arguments = {
        **prepared.arguments,
        # transformers wants to be told that a machine has no accelerator before it trains in bf16 there.
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        **prepared.run.training.extra,
    }
    trainer = careful(task.trainer())(
        model=model,
        args=make_arguments(task.arguments_class(), arguments),
        train_dataset=prepared.encoded["train"].rows,
        eval_dataset=prepared.for_trainer("validation"),
        processing_class=prepared.processor,
        callbacks=[AdapterCallback(), NoStepTooMany(), *callbacks],
        **task.options(prepared.processor, prepared.rows.labels),
    )
    trainer.task = task
    check_saves(trainer)
    if optimizer is not None:
        make_optimizer_by(trainer, *optimizer.for_trainer(model))
    if task.loss_of_batch:
        loss_is_of_its_batch(trainer)
    base: Any = model.get_base_model()
    if task.loss_of_labels:
        score_labels_only(base)
    if task.fused_head and not (
        trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    ):  # whose weights are not whole here
        with trainer.compute_loss_context_manager():
            example = {key: value.to(base.device) for key, value in task.example(base.config).items()}
            mend_loss_of_routers(trainer, base, example)
            if score_as_the_model_does(base, example, terms=task.loss_of_labels):
                add_terms_of_the_model(trainer)
    if trainer.label_smoother is not None and getattr(trainer, "aux_loss_enabled", False):
        raise RankfoldError(
            f"training.extra: label_smoothing_factor={trainer.args.label_smoothing_factor:g} would leave out what "
            f"{type(base).__name__} adds to its loss; remove it, or set router_aux_loss_coef: 0 beside it where that "
            "is the loss of its routers"
        )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress())
    if hasattr(model.base_model, "update_and_allocate"):
        trainer.add_callback(RankAllocation())
    return trainer
