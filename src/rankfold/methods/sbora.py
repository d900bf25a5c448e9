"""SBoRA: one of LoRA's factors is r rows of an identity matrix, so that the update lies in r columns (or rows) of W.

Paper: SBoRA, Low-Rank Adaptation with Regional Weight Updates, arXiv 2407.05413; its body could not be read. From the
authors' code and its README, with I = (i₁ … i_r), distinct and in the order in which they were drawn, and s = α/r:

    FA   A frozen, row j = e_{i_j}ᵀ, B = 0 trained:      ΔW[:, I] = s·B      y = Wx + s·B·dropout(x)[I]
    FB   B frozen, column j = e_{i_j}, A = 0 trained:    ΔW[I, :] = s·A      y = Wx;  y[I] += s·A·dropout(x)

The frozen factor is never multiplied by: the kernel gathers and scatters (`Factors.down_index`, `up_index`). QSBoRA is the
same adapter on a quantised base.

OUR INTERPRETATION: the draw. The code draws from Python's unseeded generator, so its index sets cannot be had again; here they
follow from `seed` and the module's name, and are saved. The README claims that adapters with disjoint sets do not disturb
each other, and the code has no rule that makes them so; here `region` n takes the n-th r entries of one permutation.
`draw="first"` is the variant that arXiv 2606.13767 calls cLA: the first columns instead of random ones.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from rankfold.errors import RankfoldError
from rankfold.host.adapter import Adapter, Site, kaiming_
from rankfold.host.config import LowRankConfig, is_whole
from rankfold.host.registry import Method, register
from rankfold.kernel.factors import Factors


@dataclass
class SboraConfig(LowRankConfig):
    """SBoRA and QSBoRA (arXiv 2407.05413).

    Args:
        variant: "fa", the update lies in r columns of W; "fb", in r rows.
        seed: of the draw, together with the module's name.
        region: 0, 1, …; adapters of one seed and rank whose regions differ have disjoint index sets. r·(region + 1) may not
            exceed a module's inputs (FA) or outputs (FB).
        draw: "random", or "first" for the first columns (rows).
    """

    method: ClassVar[str] = "sbora"
    variant: str = field(default="fa", metadata={"help": '"fa": r columns of the weight change; "fb": r rows.'})
    seed: int = field(default=0, metadata={"help": "Seed of the draw of the columns or rows."})
    region: int = field(default=0, metadata={"help": "Adapters of one seed with other regions change other columns."})
    draw: str = field(default="random", metadata={"help": '"random", or "first": the first columns or rows.'})

    def check(self) -> None:
        super().check()
        self.require("variant", self.variant, self.variant in ("fa", "fb"), '"fa" or "fb"')
        self.require("region", self.region, is_whole(self.region) and self.region >= 0, "an integer >= 0")
        self.require("draw", self.draw, self.draw in ("random", "first"), '"random" or "first"')

    def available(self, site: Site) -> int:
        """How many columns (FA) or rows (FB) the site's weight has."""
        return site.in_features if self.variant == "fa" else site.out_features

    def region_at(self, site: Site) -> slice:
        """Which entries of the site's permutation are this region's; raises RankfoldError where it does not have them."""
        r, n = self.rank_at(site.name), self.available(site)
        first = self.region * r
        if first + r > n:
            what = "columns" if self.variant == "fa" else "rows"
            raise RankfoldError(
                f"SboraConfig: r={r} with region={self.region} exceeds {site.name}, whose weight has {n} {what}; "
                f"choose r * (region + 1) <= {n}, for this module alone with rank_pattern"
            )
        return slice(first, first + r)

    def index_at(self, site: Site) -> list[int]:
        """The site's index set, in the order in which it was drawn; raises as `region_at`."""
        region, places = self.region_at(site), list(range(self.available(site)))
        if self.draw == "random":
            random.Random(f"{self.seed}/{site.name}").shuffle(places)
        return places[region]


class Sbora(Adapter):
    index: Tensor

    def __init__(self, config: SboraConfig, site: Site, shared: nn.Module | None = None) -> None:
        super().__init__(config, site, shared)
        self.by_columns, self.size = config.variant == "fa", config.available(site)
        if self.by_columns:
            self.up = nn.Parameter(torch.empty(site.out_features, self.r))  # B
        else:
            self.down = nn.Parameter(torch.empty(self.r, site.in_features))  # A
        self.register_buffer("index", torch.tensor(config.index_at(site), dtype=torch.int64))

    @classmethod
    def check_site(cls, config: SboraConfig, site: Site) -> None:
        config.region_at(site)

    def reset_parameters(self, init: bool | str) -> None:
        for trained in self.parameters():
            if init:
                nn.init.zeros_(trained)
            else:
                kaiming_(trained)

    def check_state(self, state: dict[str, Tensor]) -> None:
        index = state["index"]
        whole = not index.is_floating_point() and len(index.unique()) == len(index)
        if not whole or index.min() < 0 or index.max() >= self.size:
            raise RankfoldError(
                f"The checkpoint of this sbora adapter has an index set at {self.site.name} that repeats an index or leaves "
                f"0 to {self.size - 1}: it was edited, or trained on another base model"
            )

    def blocks(self) -> Sequence[Factors]:
        (trained,) = self.parameters()
        chosen = torch.zeros(self.r, self.size, dtype=trained.dtype, device=self.index.device)
        chosen.scatter_(1, self.index[:, None], 1.0)
        if self.by_columns:
            return (Factors(chosen, trained, scale=self.scaling, down_index=self.index),)
        return (Factors(trained, chosen.T, scale=self.scaling, up_index=self.index),)


SBORA = register(
    Method(
        name="sbora",
        title="SBoRA",
        paper="2407.05413",
        summary="Trains r columns (or rows) of every weight: half of LoRA's parameters, half of its products.",
        config=SboraConfig,
        adapter=Sbora,
        example={"r": 16},
        variants={"sbora fa": {"variant": "fa"}, "sbora fb": {"variant": "fb"}},
    )
)
