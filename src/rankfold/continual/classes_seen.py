"""One head for the classes of all tasks: which of its outputs count, in the loss and when it is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import TrainerCallback

from rankfold.io.models import ModelError


class ClassesSeen(TrainerCallback):
    """Has the head give the least number for every class that does not count, so that it is neither learnt nor predicted.

    Its softmax is exactly 0 there, and so is the gradient of its row in the head.

    Args:
        trained: indices of the classes in the training loss.
        seen: indices of the classes that a prediction may choose.
        classes: of the head.
    """

    def __init__(self, trained: Sequence[int], seen: Sequence[int], classes: int):
        self.hidden = {True: _others(trained, classes), False: _others(seen, classes)}
        self.called = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        trained = [m for m in model.get_base_model().children() if isinstance(m, ModulesToSaveWrapper)]
        if not trained:
            raise ModelError("loss_over: the model has no trained head whose classes could be told apart")
        trained[-1].register_forward_hook(self._hide)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.called:  # silently, every class would count
            raise ModelError(
                "loss_over: the model computed its classes without the head that it has; use another class of model"
            )

    def _hide(self, head: nn.Module, inputs: Any, output: Any) -> Tensor:
        self.called, hidden = True, self.hidden[head.training]
        if not isinstance(output, Tensor) or output.shape[-1] != len(hidden):
            raise ModelError(
                f"loss_over: the head of the model does not end in one output per class ({len(hidden)}), so its classes cannot be "
                "told apart; use another class of model"
            )
        return output.masked_fill(hidden.to(output.device), torch.finfo(output.dtype).min)


def _others(indices: Sequence[int], classes: int) -> Tensor:
    mask = torch.ones(classes, dtype=torch.bool)
    mask[list(indices)] = False
    return mask
