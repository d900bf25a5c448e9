"""RaSA: k of every layer's r ranks go into a pool that all layers of one module type share, each through its own diagonal.

Paper: RaSA, Rank-Sharing Low-Rank Adaptation, arXiv 2503.12576 (ICLR 2025). For layer i of L, with R = r − k + Lk:

    ΔW_i = [B̃_i  B_S] · diag(d_i) · [Ã_i ; A_S]

From the paper and the authors' code: the order private then pool, d trainable and carrying the whole scale (no α/r at run
time), Kaiming Ã and A_S (one Lk × in matrix), B̃ = B_S = 0, d = ½α/(r−k) on private and ½α/(Lk) on pooled coordinates.
Ours: a type is name *and* shape, for any architecture (the code knows only `layers.N`); k = 0 starts as LoRA, d = α/r
(the code divides by zero); k = r starts with the whole mass α/(Lr) on the pool; with use_rslora d is multiplied by √r,
which turns α/r into α/√r.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from rankfold.errors import RankfoldError
from rankfold.host.adapter import Adapter, Group, Shared, Site, first_pair_, group_by_type
from rankfold.host.config import LowRankConfig, is_whole
from rankfold.host.registry import Method, register
from rankfold.kernel.factors import Factors


@dataclass
class RasaConfig(LowRankConfig):
    """RaSA (arXiv 2503.12576).

    Args:
        shared_rank: k, how many of each layer's r ranks are pooled, 0 ≤ k ≤ r. None: the paper's max(r/8, 1).
    """

    method: ClassVar[str] = "rasa"
    shared_rank: int | None = field(
        default=None, metadata={"help": "k: how many of the r ranks each layer gives to the pool; default max(r/8, 1)."}
    )

    def check(self) -> None:
        super().check()
        k = self.shared_rank
        self.require(
            "shared_rank", k, k is None or (is_whole(k) and k >= 0), "an integer >= 0, or null for max(r/8, 1)"
        )
        for r in {self.r, *self.rank_pattern.values()}:
            k = self.pooled(r)
            if k > r:
                raise RankfoldError(f"RasaConfig: shared_rank={k} exceeds r={r}; choose 0 <= shared_rank <= r")

    def pooled(self, r: int) -> int:
        """k for a module of rank r."""
        return max(r // 8, 1) if self.shared_rank is None else self.shared_rank

    def with_rank(self, n: int) -> Self:
        """k stays as it is, but never exceeds r."""
        return self.changed(r=n, shared_rank=None if self.shared_rank is None else min(self.shared_rank, n))

    def ranks(self) -> dict[str, int]:
        return {"r": self.r, "shared_rank": self.pooled(self.r)}

    def ranks_in_words(self) -> str:
        return f"r {self.r}, k {self.pooled(self.r)}"


class Pool(Shared):
    """A_S and B_S of one module type."""

    def __init__(self, rank: int, group: Group) -> None:
        super().__init__()
        site = group.sites[0]
        self.down = nn.Parameter(torch.empty(rank, site.in_features))  # A_S, Lk × in
        self.up = nn.Parameter(torch.empty(site.out_features, rank))  # B_S, out × Lk

    def forward(self) -> tuple[Tensor, Tensor]:
        """A_S and B_S; a call, so that accelerate's hooks fetch them where they are offloaded."""
        return self.down, self.up


class Rasa(Adapter):
    def __init__(self, config: RasaConfig, site: Site, shared: Pool | None) -> None:
        super().__init__(config, site, shared)
        self.private = self.r - config.pooled(self.r)
        pooled = 0 if shared is None else shared.down.shape[0]
        if self.private:  # k = r leaves none, and FSDP takes no empty tensor
            self.down = nn.Parameter(torch.empty(self.private, site.in_features))  # Ã_i
            self.up = nn.Parameter(torch.empty(site.out_features, self.private))  # B̃_i
        self.gate = nn.Parameter(torch.empty(self.private + pooled))  # d_i

    @classmethod
    def group_key(cls, config: RasaConfig, site: Site) -> str | None:
        return group_by_type(config, site) if config.pooled(config.rank_at(site.name)) else None

    @classmethod
    def check_group(cls, config: RasaConfig, group: Group) -> None:
        ranks = {config.rank_at(s.name) for s in group.sites}
        if len(ranks) > 1:
            raise RankfoldError(
                f"RasaConfig: rank_pattern gives {group.key} the ranks {sorted(ranks)}, and layers that pool must agree; "
                "give the whole module type one rank"
            )

    @classmethod
    def make_shared(cls, config: RasaConfig, group: Group) -> Pool:
        pool = Pool(len(group) * config.pooled(config.rank_at(group.sites[0].name)), group)
        first_pair_(pool.down, pool.up, group.sites[0], random=not config.init_lora_weights)
        return pool

    def reset_parameters(self, init: bool | str) -> None:
        if self.private:
            first_pair_(self.down, self.up, self.site, random=not init)
        pooled = len(self.gate) - self.private
        mass = self.scaling * self.r  # α, or α√r with rsLoRA
        share = 0.5 if self.private and pooled else 1.0
        with torch.no_grad():
            self.gate[: self.private] = share * mass / max(self.private, 1)
            self.gate[self.private :] = share * mass / max(pooled, 1)

    def blocks(self) -> Sequence[Factors]:
        blocks = []
        if self.private:
            blocks.append(Factors(self.down, self.up, self.gate[: self.private]))
        pool: Pool | None = self.shared
        if pool is not None:
            down, up = pool()
            # Layers may be spread over devices, and the pool lies on one of them
            blocks.append(Factors(down.to(self.gate.device), up.to(self.gate.device), self.gate[self.private :]))
        return blocks


RASA = register(
    Method(
        name="rasa",
        title="RaSA",
        paper="2503.12576",
        summary="Pools k ranks of every layer; rank r-k+Lk for LoRA's parameter budget.",
        config=RasaConfig,
        adapter=Rasa,
        folds_at="r-k+L*k",
        starter=True,
        example={"shared_rank": 1},
    )
)
