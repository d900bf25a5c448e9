"""COLA: a chain of LoRAs. A pair is trained for a while, becomes a frozen link, and a new pair with a new optimiser state begins.

Paper: Chain of LoRA, arXiv 2401.04151. From notes on the paper (its code is not public): a new link has random A and B = 0; the
optimiser's state of the pair is dropped, step count included; chains of 1 (= LoRA), 2 and 3 links; ranks may step down.
NOT FOUND: where the knots of three links lie, and what happens to the learning rate. OUR INTERPRETATION: links of equal length; one
learning-rate schedule over the whole run, without a restart and without warm-up at a knot; α/r stays that of `r` when ranks step
down. Ours: links stay factors, and W is not written. `preset="beyond_lora"` is the practice of independent code
(arXiv 2606.13767): A ~ N(0, 0.02²), and the learning rate of the first knot held to the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from rankfold.host.registry import Method, register
from rankfold.methods.chain import Chain
from rankfold.methods.knots import ChainConfig, ChainController, expected_links

PRESETS: dict[str, dict[str, str]] = {
    "paper": {},
    "beyond_lora": {"init_lora_weights": "normal", "restart_schedule": "hold"},
}


@dataclass
class ColaConfig(ChainConfig):
    """COLA (arXiv 2401.04151).

    Args:
        link_ranks: rank of each link, where they step down; each in 1..r, one per link.
        preset: "paper", or "beyond_lora" for what arXiv 2606.13767 does.

    `init_lora_weights`: True, "normal" (A ~ N(0, 0.02²)), or False (random A and B, for tests).
    """

    method: ClassVar[str] = "cola"
    inits: ClassVar[tuple[str, ...]] = ("normal",)
    link_ranks: list[int] | None = field(
        default=None, metadata={"help": "Rank of each link, where ranks step down; one per link, each at most r."}
    )
    preset: Literal["paper", "beyond_lora"] = field(
        default="paper",
        metadata={"help": '"beyond_lora": A ~ N(0, 0.02^2), learning rate held from the first knot on.'},
    )

    def __post_init__(self) -> None:
        for name, value in PRESETS.get(self.preset, {}).items():
            if getattr(self, name) in (True, "none"):
                setattr(self, name, value)
        super().__post_init__()

    def check(self) -> None:
        super().check()
        ranks, links = self.link_ranks, expected_links(self)
        good = ranks is None or all(1 <= rank <= self.r for rank in ranks)
        self.require("link_ranks", ranks, good, f"a list of ranks in 1..r={self.r}")
        self.require("link_ranks", ranks, ranks is None or len(ranks) == links, f"one rank for each of links={links}")

    def with_rank(self, n: int) -> Self:
        """The ranks that links step down to stay as they are, but never exceed r."""
        return self.changed(r=n, link_ranks=self.link_ranks and [min(rank, n) for rank in self.link_ranks])


class Cola(Chain):
    config: ColaConfig

    def fresh(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        down, up = super().fresh(generator)
        if self.config.init_lora_weights == "normal" and self.site.kind != "embedding":  # there A is 0, and B random
            nn.init.normal_(down, std=0.02, generator=generator)
        return down, up

    def components(self, link: int) -> int:
        ranks: Sequence[int] | None = self.config.link_ranks
        return self.r if ranks is None else min(ranks[min(link, len(ranks) - 1)], self.r)


COLA = register(
    Method(
        name="cola",
        title="COLA",
        paper="2401.04151",
        summary="A chain of LoRAs, each trained on what the ones before it left; the ranks add up.",
        config=ColaConfig,
        adapter=Cola,
        controller=ChainController,
        folds_at="sum of the links' ranks",
        example={"links": 2},
    )
)
