"""The intrinsic dimension of what enters and leaves every block of a model, on given inputs.

OUR INTERPRETATION of what GeLoRA's summaries leave open: one vector per sequence, the attention-masked mean over tokens
(at the embeddings the first token is the same for all inputs, and has no dimension); the model in eval mode without
adapters; states in float32. They are read from the blocks themselves, so the last one is what the last block gives,
before the final norm (transformers' `hidden_states[-1]` of a decoder is after it; all others are the same).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankfold.errors import RankfoldError
from rankfold.gelora.blocks import Stack, find_stacks
from rankfold.gelora.dimension import DISCARD, Fit, random_halves, two_nn_of

#: Fewer points than this say nothing about a dimension.
FEWEST = 50


@dataclass(frozen=True)
class Chain:
    """The dimensions along one stack of L blocks.

    Args:
        stack: its name.
        samples: L + 1 rows, the input of block 0 and then the output of each block; in a row, one d per subsample.
    """

    stack: str
    samples: tuple[tuple[float, ...], ...]

    @property
    def d(self) -> list[float]:
        """Mean over the subsamples, for each of the L + 1 states."""
        return [statistics.fmean(row) for row in self.samples]

    @property
    def spread(self) -> list[float]:
        """Standard deviation over the subsamples."""
        return [statistics.stdev(row) for row in self.samples]


@dataclass(frozen=True)
class Dimensions:
    """What was measured, a chain for each stack that ran.

    Args:
        points: sequences.
        seconds: time in the model and in the estimator.
    """

    chains: tuple[Chain, ...]
    points: int
    subsamples: int
    seed: int
    fit: Fit
    discard: float
    seconds: dict[str, float]


def intrinsic_dimensions(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    targets: Sequence[str] | None = None,
    subsamples: int = 5,
    seed: int = 0,
    fit: Fit = "linear",
    discard: float = DISCARD,
) -> Dimensions:
    """The dimension of every block's input and output.

    Args:
        model: pretrained, without adapters: decoder-only, encoder, both, or vision.
        batches: what `model(**batch)` takes, each sequence once; `attention_mask` (and for the decoder of an
            encoder-decoder `decoder_attention_mask`) says which tokens count, without it all do. `labels` are left out.
        targets: see `find_stacks`.
        subsamples: random halves, at least 3.
        seed: of the halves.
        fit, discard: of TwoNN.

    Raises:
        ValueError: too few points, states that are not finite or not batch × tokens × width, or shared blocks.
    """
    stacks = find_stacks(model, targets)
    began = time.perf_counter()
    states = pooled_states(model, batches, stacks)
    measured_at = time.perf_counter()
    points = len(next(iter(states.values()))[0]) if states else 0
    if points < FEWEST:
        raise RankfoldError(f"batches: {points} sequences are too few to measure a dimension; give {FEWEST} or more")
    halves = random_halves(points, subsamples, seed)
    chains = []
    for stack, layers in states.items():
        rows = []
        for i, layer in enumerate(layers):
            if not torch.isfinite(layer).all():
                where = f"the input of {stack}.0" if i == 0 else f"the output of {stack}.{i - 1}"
                raise RankfoldError(f"model: NaN or infinity in {where}; load it in float32, or check its weights")
            rows.append(tuple(two_nn_of(layer, halves, fit, discard)))
        chains.append(Chain(stack, tuple(rows)))
    seconds = {"states": measured_at - began, "dimensions": time.perf_counter() - measured_at}
    return Dimensions(tuple(chains), points, subsamples, seed, fit, discard, seconds)


@torch.no_grad()
def pooled_states(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], stacks: Sequence[Stack]
) -> dict[str, list[Tensor]]:
    """By stack, its L + 1 states as N × width, in float32 on the CPU; stacks that did not run are left out."""
    trunk = model.base_model if isinstance(model, PreTrainedModel) else model  # no logits over the vocabulary
    device = next(model.parameters()).device
    found: dict[str, list[list[Tensor]]] = {stack.name: [[] for _ in range(len(stack) + 1)] for stack in stacks}
    masks: dict[str, Tensor | None] = {}
    both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))

    def keep(stack: Stack, index: int, states: Any) -> None:
        states = states if isinstance(states, Tensor) else states[0]
        decoder = both and "decoder" in stack.name
        mask = masks["decoder_attention_mask" if decoder else "attention_mask"]
        found[stack.name][index].append(masked_mean(states, mask, f"{stack.name} state {index}").cpu())

    with _evaluating(model), _hooked(stacks, keep):
        for number, batch in enumerate(batches, 1):
            inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
            for name in ("attention_mask", "decoder_attention_mask"):
                masks[name] = inputs.get(name)
            trunk(**inputs)
            for stack in stacks:
                _check_ran_once(stack, found[stack.name], number)
    return {name: [torch.cat(s) for s in states] for name, states in found.items() if states[0]}


def masked_mean(states: Tensor, mask: Tensor | None, where: str = "states") -> Tensor:
    """The mean over tokens, in float32.

    Args:
        states: batch × tokens × width.
        mask: batch × tokens, 0 where a token does not count; None: all count.

    Raises:
        ValueError: shapes that do not fit, or a row without a token.
    """
    if states.ndim != 3 or (mask is not None and mask.shape != states.shape[:2]):
        shape = None if mask is None else tuple(mask.shape)
        raise RankfoldError(f"{where}: shape {tuple(states.shape)} with mask {shape} is not batch × tokens × width")
    if mask is None:
        return states.float().mean(1)
    counts = mask.bool().sum(1, keepdim=True)
    if not counts.all():
        raise RankfoldError(f"{where}: attention_mask leaves a sequence without a token; drop empty texts")
    # Not a product with the mask: where a row of padding is NaN, that would spread it
    return states.float().masked_fill(~mask.bool()[..., None], 0.0).sum(1) / counts


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _hooked(stacks: Sequence[Stack], keep: Any) -> Iterator[None]:
    handles = []

    def entering(stack: Stack) -> Any:
        return lambda _, args, kwargs: keep(stack, 0, args[0] if args else kwargs["hidden_states"])

    def leaving(stack: Stack, index: int) -> Any:
        return lambda _, args, output: keep(stack, index, output)

    try:
        for stack in stacks:
            handles.append(stack.blocks[0].register_forward_pre_hook(entering(stack), with_kwargs=True))
            handles += [block.register_forward_hook(leaving(stack, i)) for i, block in enumerate(stack.blocks, 1)]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_ran_once(stack: Stack, states: list[list[Tensor]], batches: int) -> None:
    counts = {len(state) for state in states}
    if counts == {0} or counts == {batches}:
        return
    raise RankfoldError(
        f"{stack.name}: its blocks ran {sorted(len(s) for s in states)} times in {batches} batches; blocks that share "
        "weights (ALBERT) or are skipped cannot have a rank of their own"
    )
