"""PairOptimizer: the torch optimiser around a rule. A rule changes stacks of pairs; this does the rest, once for all rules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import RankfoldError
from rankfold.optim.adam import plain_adamw
from rankfold.optim.options import check_lr
from rankfold.optim.pair_aware import PairAware
from rankfold.optim.pairs import Pair
from rankfold.optim.stacks import Batch, Shapes, Stack, by_shape

#: `param_group["kind"]`.
PAIRS, PLAIN = "pairs", "plain"


class PairOptimizer(PairAware):
    """Base of the optimisers that step both factors of a pair together.

    Args:
        model: a model with adapters, whose plain parameters go to AdamW; or a sequence of pairs, and nothing else is trained.
        lr: learning rate of the pairs.
        options: the fields of the class's `Options`.

    A rule reads the gradients and leaves them as they are. A pair whose gradient has NaN or infinity is left out of the step, and
    so is its state. A closure is called once, before the step. `add_param_group` adds plain parameters only.

    Raises:
        RankfoldError: what `pairs` raises; an option that does not exist or is out of range.
    """

    def __init__(self, model: nn.Module | Sequence[Pair], lr: float = 1e-3, **options: Any) -> None:
        check_lr(type(self).__name__, lr)
        self.options = self.Options.of(options)
        parts = self.take(model)
        own, plain = parts.pairs, parts.plain
        self.pairs = own
        self._stacks = self._stacked()
        groups: list[dict[str, Any]] = [
            {
                "params": [p for pair in own for p in self._trained(pair)],
                "kind": PAIRS,
                "pairs": [[pair.name, *pair.shape] for pair in own],
            }
        ]
        # As everywhere: vectors (biases, norms, gates, magnitudes) are not decayed
        for vectors in (False, True):
            params = [p.parameter for p in plain if (p.parameter.ndim < 2) == vectors]
            if params:
                groups.append({"params": params} | ({"weight_decay": 0.0} if vectors else {}))
        super().__init__(groups, {"lr": float(lr), **asdict(self.options), "kind": PLAIN})

    # What a rule says, besides `remembers` ----------------------------------------------------------------------------

    def rule(self, batches: list[Batch], group: dict[str, Any]) -> None:
        """One step: changes factors and state of every batch in place. `group` has lr and the options."""
        raise NotImplementedError

    # What torch asks --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One optimiser step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["kind"] == PAIRS:
                self._step_pairs(group)
            else:
                plain_adamw(group["params"], self.state, group)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds plain parameters, trained by AdamW with the group's `lr`, `betas`, `eps` and `weight_decay`."""
        if self.param_groups and param_group.get("kind", PLAIN) != PLAIN:
            raise RankfoldError(
                f"{type(self).__name__}.add_param_group: kind={param_group['kind']!r} must be {PLAIN!r}; for other pairs make a "
                "new optimiser of the model"
            )
        plain = param_group.get("kind", PLAIN) == PLAIN
        if plain and "lr" not in param_group and self.options.plain_lr is not None:
            param_group["lr"] = self.options.plain_lr
        super().add_param_group(param_group)

    def expected(self) -> Mapping[nn.Parameter, Shapes]:
        return {pair.up: self._shapes(pair) for pair in self.pairs}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"options": self.options, "pairs": self.pairs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stacks = self._stacked()

    # The pairs' part of a step ----------------------------------------------------------------------------------------

    def _trained(self, pair: Pair) -> Iterable[nn.Parameter]:
        return (pair.down, pair.up) if self.trains_down else (pair.up,)

    def _shapes(self, pair: Pair) -> Shapes:
        return self.remembers(*pair.shape, self.options)

    def _stacked(self) -> list[Stack]:
        return [Stack(same, self._shapes(same[0])) for same in by_shape(self.pairs)]

    def _step_pairs(self, group: dict[str, Any]) -> None:
        own = (p for pair in self.pairs for p in self._trained(pair))
        if any(a is not b for a, b in zip(own, group["params"], strict=True)):
            raise RankfoldError(
                f"{type(self).__name__}: the parameters in its groups were replaced after it was made (FSDP2 does that), and they "
                "are not its pairs any more; use DDP, or take LoraPlus or AdamW"
            )
        half = next((p for p in self.pairs if self.trains_down and p.down.requires_grad != p.up.requires_grad), None)
        if half is not None:  # its moments would go on moving the frozen factor
            raise RankfoldError(
                f"{type(self).__name__}: {half.name}: {'up' if half.down.requires_grad else 'down'} was frozen after the optimiser was "
                "made, and it steps both factors of a pair together; freeze both, or take torch.optim.AdamW"
            )
        self.freeze(self.pairs)  # PEFT asks all of an adapter for gradients again after `disable_adapter()`
        todo = self._batches(frozenset())
        finite = [batch.finite() for _, batch, _ in todo]
        # One look at all of them: on a GPU each look waits for it
        if todo and not bool(torch.cat([ok.to(finite[0].device) for ok in finite]).all()):
            skipped = {
                pair.up for (_, batch, _), ok in zip(todo, finite, strict=True) for pair in _where_not(batch.pairs, ok)
            }
            self._say_skipped(skipped)
            todo = self._batches(frozenset(skipped))
        if not todo:
            return
        self.rule([batch for _, batch, _ in todo], group)
        for stack, batch, indices in todo:
            stack.write_back(batch, indices, self.state, self.trains_down)

    def _say_skipped(self, skipped: set[nn.Parameter]) -> None:
        first = next(pair.name for pair in self.pairs if pair.up in skipped)
        warnings.warn(
            f"{type(self).__name__}: {len(skipped)} of {len(self.pairs)} pairs (the first: {first}) have NaN or infinity in their "
            "gradients and are left out of this step; where that happens often, lower the learning rate or look for a bad batch",
            stacklevel=2,
        )

    def _batches(self, skipped: frozenset[nn.Parameter]) -> list[tuple[Stack, Batch, Tensor | None]]:
        if not all(stack.fits() for stack in self._stacks):  # the model was moved or cast after the optimiser was made
            self._stacks = self._stacked()
        return [
            (s, batch, indices)
            for s in self._stacks
            for batch, indices in s.batches(self.state, self.trains_down, skipped)
        ]


def _where_not(pairs: list[Pair], ok: Tensor) -> list[Pair]:
    return [pair for pair, good in zip(pairs, ok.tolist(), strict=True) if not good]
