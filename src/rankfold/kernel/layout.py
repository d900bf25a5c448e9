"""What one fused call of several adapted linear layers consists of: members and terms as callers give them, and the same as a
static layout and a flat list of tensors, as autograd.Function takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from rankfold.kernel.dropout import drop_mask
from rankfold.kernel.factors import Factors


class Term(NamedTuple):
    """What one adapter adds: the sum of its blocks' updates, all reading the same (dropped) input.

    Args:
        own_mask: the mask is for this layer alone, not for its siblings.
    """

    blocks: Sequence[Factors]
    dropout: float = 0.0
    own_mask: bool = False


class Member(NamedTuple):
    """One of several linear layers that share an input.

    Args:
        weight: out × in; None for a base that computes its own output.
        bias: out, or None.
        terms: one per active adapter.
    """

    weight: Tensor | None
    bias: Tensor | None
    terms: Sequence[Term]


class FactorSlots(NamedTuple):
    """One `Factors` of a fused pass: the index of each of its tensors in the flat list, its rank and its scale."""

    down: int
    up: int
    gate: int
    down_index: int
    up_index: int
    rank: int
    scale: float


class Layout(NamedTuple):
    """Everything about one fused call except its tensors.

    The flat list holds their weights, their biases, a mask per term, and five tensors per `Factors`.

    Args:
        members: how many.
        inv_keeps: 1/(1 − p) of each term.
        slots: [term][member], each a sequence.
        ranks: [term][member], summed over the blocks.
    """

    members: int
    inv_keeps: tuple[float, ...]
    slots: tuple[tuple[tuple[FactorSlots, ...], ...], ...]
    ranks: tuple[tuple[int, ...], ...]

    def bias(self, member: int) -> int:
        """The index of a member's bias; that of its weight is `member` itself."""
        return self.members + member

    def masks(self) -> slice:
        return slice(2 * self.members, 2 * self.members + len(self.ranks))


def flatten_for_autograd(x: Tensor, members: Sequence[Member]) -> tuple[Layout, list[Tensor | None]]:
    """Flattens one fused call for autograd.Function: a static layout and a flat list of tensors. Dropout masks are drawn here.

    Args:
        x: … × in, what all members read.
    """
    terms = list(zip(*[[t for t in m.terms if t.blocks] for m in members], strict=True))
    tensors: list[Tensor | None] = [m.weight for m in members]
    tensors += [m.bias for m in members]
    inv_keeps, slots, ranks = [], [], []
    for first, *_ in terms:
        mask, keep = drop_mask(x, first.dropout)
        tensors.append(mask)
        inv_keeps.append(1.0 / keep if keep else 0.0)
    for term in terms:
        slots.append([])
        for own in term:
            slots[-1].append([])
            for f in own.blocks:  # one of rank 0 too: DDP waits for its (empty) gradients
                at = len(tensors)
                slots[-1][-1].append(FactorSlots(at, at + 1, at + 2, at + 3, at + 4, f.rank, f.scale))
                tensors += (f.down, f.up, f.gate, f.down_index, f.up_index)
        ranks.append(tuple([sum([block.rank for block in own]) for own in slots[-1]]))
    frozen = tuple([tuple([tuple(own) for own in term]) for term in slots])
    return Layout(len(members), tuple(inv_keeps), frozen, tuple(ranks)), tensors
