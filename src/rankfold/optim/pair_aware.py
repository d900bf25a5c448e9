"""PairAware: what all of our optimisers have in common. They are made of a model, and restore their state exactly or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from rankfold.optim.options import Options
from rankfold.optim.pairs import Pair, Split, split, split_pairs
from rankfold.optim.stacks import Shapes
from rankfold.optim.state_check import check_state, restore_types


class PairAware(torch.optim.Optimizer):
    """Base of the optimisers that find the pairs of a model by themselves."""

    #: The class of its options.
    Options: ClassVar[type[Options]] = Options
    #: Whether it trains `down` too. One that does not freezes it.
    trains_down: ClassVar[bool] = True
    #: Whether a step is computed from both factors: they must then be whole, and their gradients the update's alone.
    joint: ClassVar[bool] = True

    @classmethod
    def remembers(cls, out: int, in_: int, r: int, options: Options) -> Shapes:
        """The state of one pair: name to shape. It starts at zero."""
        raise NotImplementedError

    @classmethod
    def split(cls, model: nn.Module | Sequence[Pair]) -> Split:
        """What it would train: all of a model, or the given pairs and nothing else.

        Raises:
            RankfoldError: what `pairs` raises; neither a model nor pairs.
        """
        if isinstance(model, nn.Module):
            return split(model, frozen_down=not cls.trains_down, joint=cls.joint)
        return split_pairs(cls.__name__, model)

    @classmethod
    def take(cls, model: nn.Module | Sequence[Pair]) -> Split:
        """As `split`, and freezes what it does not train, so that whoever counts or wraps the model afterwards sees it."""
        parts = cls.split(model)
        cls.freeze(parts.pairs)
        return parts

    @classmethod
    def freeze(cls, pairs: Sequence[Pair]) -> None:
        """Freezes what it does not train of `pairs`."""
        for pair in pairs if not cls.trains_down else ():
            if pair.down.requires_grad:
                pair.down.requires_grad_(False)
                pair.down.grad = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state exactly, types included; raises RankfoldError for that of another model, rank or optimiser."""
        expected = self.expected()
        check_state(self, state_dict, expected)
        super().load_state_dict(state_dict)
        restore_types(self, state_dict, expected)

    def expected(self) -> Mapping[nn.Parameter, Shapes]:
        """Shapes of the state of those parameters that have more than tensors of their own shape."""
        return {}
