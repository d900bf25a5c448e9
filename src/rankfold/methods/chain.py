"""A live pair beside frozen links: the forward that COLA, RAC-LoRA, XGBLoRA and Delta-LoRA have in common.

    ΔW = s·B·A + Σ_k s·B_k·A_k

The links lie side by side in two buffers that grow at every knot, in float32. Nothing is merged: W stays the hub's, so the chain
can be switched, served, resumed and folded, and no update is lost to a rounded weight. Who ties a knot, and when, is in knots.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from rankfold.control.sharded import fill_, whole
from rankfold.host.adapter import Adapter, Site, first_pair_
from rankfold.host.config import LowRankConfig
from rankfold.kernel.factors import Factors
from rankfold.kernel.layout import Term


class Chain(Adapter):
    growing: ClassVar[dict[str, int]] = {"links_down": 0, "links_up": 1}
    links_down: Tensor
    links_up: Tensor

    @property
    def planned_links(self) -> int:
        """Finished links to count where nothing is trained; `LowRankConfig.planned` sets it."""
        return vars(self.config).get("planned_links", 0)

    def __init__(self, config: LowRankConfig, site: Site, shared: nn.Module | None = None) -> None:
        super().__init__(config, site, shared)
        self.down = nn.Parameter(torch.empty(self.r, site.in_features))  # A
        self.up = nn.Parameter(torch.empty(site.out_features, self.r))  # B
        # For loaders that ask for every size beforehand; and for a plan, which counts a whole chain
        planned = min(self.planned_links * self.r, site.in_features, site.out_features)
        rank = (config.grown or {}).get(site.name, planned)
        self.register_buffer("links_down", torch.zeros(rank, site.in_features))  # A_1; A_2; …, R × in
        self.register_buffer("links_up", torch.zeros(site.out_features, rank))  # B_1 B_2 …, out × R

    def reset_parameters(self, init: bool | str) -> None:
        if init is False:
            first_pair_(self.down, self.up, self.site, random=True)
        else:
            self.start(0)

    def live(self) -> Factors:
        return Factors(self.down, self.up, scale=self.scaling)

    def links(self) -> Sequence[Factors]:
        """All finished links in one, or nothing."""
        return (Factors(self.links_down, self.links_up, scale=self.scaling),) if self.frozen_rank else ()

    def blocks(self) -> Sequence[Factors]:
        return (self.live(), *self.links())

    def terms(self) -> list[Term]:
        """What is frozen sees the whole input: a merged link has no dropout. Nor is anything kept or computed for its gradients."""
        term = self.term()
        live, *frozen = term.blocks
        return [term._replace(blocks=(live,)), *([Term(frozen)] if frozen else ())]

    @property
    def frozen_rank(self) -> int:
        return self.links_down.shape[0]

    # What a method says -----------------------------------------------------------------------------------------------------

    def fresh(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """A and B of a new link, on the CPU: LoRA's first values."""
        down = torch.empty(self.r, self.site.in_features, device="cpu")
        up = torch.empty(self.site.out_features, self.r, device="cpu")
        first_pair_(down, up, self.site, generator=generator)
        return down, up

    def components(self, link: int) -> int:
        """The rank of a link, counted from 0. The pair keeps its shape: what a link has not is zero in both factors, and stays
        zero, since either factor's gradient is a multiple of the other."""
        return self.r

    # At a knot; collective where parameters are sharded -----------------------------------------------------------------------

    @torch.no_grad()
    def start(self, link: int, generator: torch.Generator | None = None) -> None:
        """Gives the live pair the first values of a link; by default from torch's own generator."""
        down, up = self.fresh(generator)
        rank = self.components(link)
        down[rank:], up[:, rank:] = 0, 0
        fill_(self.down, down)
        fill_(self.up, up)

    def finished(self, link: int) -> Factors:
        """The live pair as a link, whole and without its scale."""
        down, up, rank = whole(self.down).detach(), whole(self.up).detach(), self.components(link)
        if up[
            :, rank:
        ].any():  # a second run goes on with the first one's last pair, which may be wider than its own first
            rank = self.r
        return Factors(down[:rank], up[:, :rank])

    def add_link(self, link: Factors) -> None:
        """Freezes a copy of `link`, which has the chain's scale."""
        self.links_down = torch.cat([self.links_down, link.down])
        self.links_up = torch.cat([self.links_up, link.up], 1)

    def drop_empty_links(self) -> None:
        """Gives up the room that a used config kept for links which this adapter never had."""
        if not self.has_history and not self.links_up.any():
            self.links_down, self.links_up = self.links_down[:0].clone(), self.links_up[:, :0].clone()

    def compact(self, error: float = 0.0) -> float:
        """Re-factors all links at once, by QR and a small SVD: in float64, stored in float32 at least.

        Args:
            error: what may be lost, relative in the Frobenius norm; 0 loses nothing but rounding.

        Returns:
            The relative error of what is stored.
        """
        device = "cpu" if self.links_up.device.type == "mps" else self.links_up.device  # which has no float64
        before = Factors(self.links_down, self.links_up).to(device, torch.float64)
        dtype = torch.promote_types(self.links_up.dtype, torch.float32)
        lost = max(error, torch.finfo(dtype).eps / 2)  # what the factors' own rounding loses is nothing to keep
        after = before.compress(energy=1 - lost**2).to(self.links_up.device, dtype)
        self.links_down, self.links_up = after.down.contiguous(), after.up.contiguous()
        norm = before.norm()
        return float(before.minus(after.to(device, torch.float64)).norm() / norm) if norm > 0 else 0.0
