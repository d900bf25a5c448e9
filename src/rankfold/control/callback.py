"""AdapterCallback: the controllers in transformers' Trainer and TRL's trainers."""

from __future__ import annotations

import json
from pathlib import Path

from peft.utils import CONFIG_NAME
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankfold.control.attach import Attached, attach
from rankfold.errors import RankfoldError
from rankfold.host.layer import AdaptedLayer
from rankfold.io.files import append_line, read_json_lines, write_whole


class AdapterCallback(TrainerCallback):
    """Attaches every scheduled adapter's controller when training begins: `Trainer(..., callbacks=[AdapterCallback()])`.

    The state is saved in the optimiser's checkpoint, so resuming needs nothing else. At each logging step the alive ranks
    are appended to `<output_dir>/ranks.jsonl`, for `rankfold inspect`.
    """

    def __init__(self) -> None:
        self.attached: Attached | None = None
        self.written = -1  # the step of the last line

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model=None,
        optimizer=None,
        **kwargs,
    ) -> None:
        if model is not None and not state.global_step:
            complete_reference(model)
        self.attached = attach(model, optimizer, total_steps=state.max_steps)  # pyright: ignore[reportArgumentType]
        for name, controller in self.attached.controllers.items():
            if state.global_step and not controller.step:
                raise RankfoldError(
                    f"adapter {name!r}: training resumes at step {state.global_step}, but the checkpoint's optimiser state holds no "
                    "schedule, so it would start again at step 0. Resume from a checkpoint with optimizer.pt "
                    "(save_only_model=False), or train anew without resume_from_checkpoint"
                )
        if self.attached.controllers and state.is_world_process_zero:
            self.written = _drop_later_lines(self._path(args), state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        # Trainer logs the last step twice, with its loss and with the summary
        if (
            self.attached
            and self.attached.controllers
            and state.is_world_process_zero
            and state.global_step > self.written
        ):
            self.written = state.global_step
            self._path(args).parent.mkdir(parents=True, exist_ok=True)
            append_line(self._path(args), json.dumps({"step": state.global_step, "ranks": self.attached.ranks()}))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.attached is None:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint:
            # The weights are those of an earlier step again, and so is how far their schedule has run
            for name, controller in self.attached.controllers.items():
                # Trainer looks for weights at the checkpoint's top alone, where only the adapter "default" lies
                saved = Path(state.best_model_checkpoint, CONFIG_NAME)
                if name == "default" and saved.exists():
                    controller.config.schedule = json.loads(saved.read_text(encoding="utf-8")).get("schedule")
        self.attached.remove()

    @staticmethod
    def _path(args: TrainingArguments) -> Path:
        return Path(args.output_dir or ".") / "ranks.jsonl"


def complete_reference(model: nn.Module) -> None:
    """Copies what is frozen in the adapter "default" to "ref", TRL's reference of it: TRL has copied its parameters alone."""
    for layer in model.modules():
        if isinstance(layer, AdaptedLayer) and {"default", "ref"} <= layer.lowrank_adapters.keys():
            trained, reference = (layer.lowrank_adapters[name].modules() for name in ("default", "ref"))
            for source, copy in zip(trained, reference, strict=True):
                copy._buffers.update({name: b.clone() for name, b in source._buffers.items() if b is not None})


def _drop_later_lines(path: Path, step: int) -> int:
    """A resumed run writes steps after its checkpoint again; what the killed one wrote of them goes.

    Returns:
        The last step that is kept, -1 where there is none.
    """
    if not path.exists():
        return -1
    rows = (row for _, row in read_json_lines(path, skip_damaged=True) if isinstance(row, dict) and "step" in row)
    kept = {row["step"]: json.dumps(row) + "\n" for row in rows if row["step"] <= step}
    write_whole(path, "".join(kept.values()))
    return max(kept, default=-1)
