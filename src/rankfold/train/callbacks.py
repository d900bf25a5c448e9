"""What happens around the trainer's steps: the file of metrics, the progress bar, the clock, AdaLoRA's schedule."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, ProgressCallback, TrainerCallback

from rankfold.io.files import append_line, write_whole
from rankfold.text import duration
from rankfold.train.metrics import read_metrics

# What the trainer logs beside losses, metrics, learning rate and gradient norm.
_UNINTERESTING = (
    "epoch",
    "total_flos",
    "runtime",
    "per_second",
    "preparation_time",
    "train_loss",
    "num_tokens",
    "tokens_seen",
    "entropy",
)


class MetricsFile(TrainerCallback):
    """Writes every log of the trainer as one line of a JSONL file, until it is closed.

    When a run resumes, the lines that it will write again are dropped first.
    """

    def __init__(self, path: Path, resume_at: int | None):
        self.path, self.closed = path, False
        rows = [] if resume_at is None else [row for row in read_metrics(path) if row["step"] <= resume_at]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.closed:
            return
        row = {key: value for key, value in (logs or {}).items() if not key.endswith(_UNINTERESTING)}
        if "test_loss" in row:  # TRL calls its own metrics of any evaluation eval_
            row = {key.replace("eval_", "test_"): value for key, value in row.items()}
        if row:
            row = {"step": state.global_step, "epoch": state.epoch, "tokens": state.num_input_tokens_seen, **row}
            append_line(self.path, json.dumps(row))

    def close(self) -> None:
        """Evaluations from here on are not the run's."""
        self.closed = True


class Progress(ProgressCallback):
    """The trainer's bar with the loss in it; where nobody watches, one line per log instead."""

    def __init__(self) -> None:
        super().__init__()
        self.watched = sys.stderr.isatty()
        self.began, self.began_at = 0.0, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began_at = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.began_at is not None:
            return
        # Now and not when training began, so that what was measured before the first step does not count.
        self.began, self.began_at = time.monotonic(), state.global_step
        if self.watched:
            super().on_train_begin(args, state, control, **kwargs)
            bar: Any = self.training_bar
            bar.initial = bar.n = self.current_step = state.global_step  # a resumed run does not start at 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.watched:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        shown = {
            key: f"{value:.4g}"
            for key, value in logs.items()
            if (key == "loss" or key.startswith("eval_"))
            and not key.endswith(_UNINTERESTING)
            and "test_loss" not in logs
        }
        if not shown or not state.is_world_process_zero:
            return
        if self.training_bar is not None:
            if "loss" in shown:
                self.training_bar.set_postfix(shown)
            else:
                self.training_bar.write(f"step {state.global_step}: {_pairs(shown)}", file=sys.stderr)
        elif not self.watched:
            left = ""
            if self.began_at is not None and (done := state.global_step - self.began_at):
                seconds = (time.monotonic() - self.began) / done * (state.max_steps - state.global_step)
                left = f", {duration(seconds, digits=2)} left"
            print(f"step {state.global_step}/{state.max_steps}: {_pairs(shown)}{left}", file=sys.stderr, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)


def _pairs(values: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


class Clock(TrainerCallback):
    """Time spent in steps, and what they saw; evaluation and saving do not count."""

    def __init__(self) -> None:
        self.seconds, self.steps, self.tokens = 0.0, 0, 0
        self._began = self._tokens_at = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tokens_at = state.num_input_tokens_seen

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._began
        self.steps += 1
        self.tokens = int(state.num_input_tokens_seen - self._tokens_at)


class StopEarly(EarlyStoppingCallback):
    """Counts evaluations during training alone. A run that had stopped early, and was killed before it saved its result,
    stays stopped when it resumes."""

    training = False

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if self.training:
            super().on_evaluate(args, state, control, metrics, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.training = True
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


class StopAt(TrainerCallback):
    """Ends training after a share of its steps, with a checkpoint to go on from; the schedule is that of all steps."""

    def __init__(self, share: float):
        self.share = share

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._reached(state):
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._reached(state):
            control.should_training_stop = control.should_save = True

    def _reached(self, state: Any) -> bool:
        return state.global_step >= math.ceil(self.share * state.max_steps)


class NoStepTooMany(TrainerCallback):
    """Makes no step where a run resumes at its end or behind it; Trainer would make one before it looks.

    It also finds the best checkpoint where the run's folder was moved; Trainer would end with the last one.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        best = Path(args.output_dir, f"checkpoint-{state.best_global_step}")
        if best.is_dir():
            state.best_model_checkpoint = str(best)
        if state.global_step >= state.max_steps:
            control.should_training_stop = True


class RankAllocation(TrainerCallback):
    """Calls AdaLoRA's `update_and_allocate`, which neither PEFT nor Trainer does."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # After the optimiser's step and before zero_grad: AdaLoRA reads the gradients.
        model.base_model.update_and_allocate(state.global_step)
