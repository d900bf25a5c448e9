"""CoRA before there is a basis: its counts follow from the shapes, so any basis of them will do."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rankfold.host.adapter import Site
from rankfold.methods.cora import CoraConfig
from rankfold.methods.cora_subspace import Subspace

NOTE = "counted without a basis: `rankfold subspace` builds it, and its file goes with the adapter"


class _AnyBasis(Subspace):
    """One for every module, as wide as asked for, without numbers."""

    def key_for(self, site: Site) -> str:
        return site.name

    def basis_for(self, site: Site) -> Tensor:
        return torch.empty(site.out_features, self.rank, device="meta")


@dataclass
class PlannedCoraConfig(CoraConfig):
    """A CoRA whose basis does not exist yet; it can be counted, and nothing else."""

    basis: str = field(default="not built yet")

    def subspace(self) -> Subspace:
        rank = max(self.r, *self.rank_pattern.values(), 1)
        return _AnyBasis(
            bases={}, sigmas={}, scope="module", source="weights", scale="none", rank=rank, targets=(), base=None, models=(),
            hash="",
        )  # fmt: skip
