"""ResLoRA's adapter: its own pair, and what it has of those of the modules before. The formulas are in res_lora.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rankfold.control.sharded import gathered
from rankfold.errors import RankfoldError
from rankfold.host.adapter import Adapter, Group, Site, first_pair_, module_type
from rankfold.kernel.factors import Factors
from rankfold.kernel.layout import Term
from rankfold.methods.shortcuts import Chain

#: Training forwards whose norms are remembered.
WINDOW = 100


def _is_expert(site: Site) -> bool:
    """Equal indices in two layers have nothing in common, nor do they see the same tokens."""
    return ".experts." in site.name


class Pair(nn.Module):
    """A_n and B_n. A module of its own, so that the layers behind can ask for them as accelerate's hooks want it."""

    def __init__(self, rank: int, site: Site) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, site.in_features))  # A_n
        self.up = nn.Parameter(torch.empty(site.out_features, rank))  # B_n

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.down, self.up


class ResLora(Adapter):
    config: Any  # ResLoraConfig, whose file imports this one
    #: ‖x_n‖_F and ("ms") ‖A_n x_n‖_F of the last training forwards, the newest last; 0 where there was none. Not with "bs".
    input_norms: Tensor
    middle_norms: Tensor

    def __init__(self, config: Any, site: Site, shared: Chain | None) -> None:
        super().__init__(config, site, shared)
        self.pair = Pair(self.r, site)
        if shared is not None:
            shared.join(self)
        if not config.fixed:
            self.register_buffer("input_norms", torch.zeros(WINDOW))
            if config.shortcut == "ms":
                self.register_buffer("middle_norms", torch.zeros(WINDOW))

    @classmethod
    def group_key(cls, config: Any, site: Site) -> str | None:
        return module_type(site.name) if config.links and not _is_expert(site) else None

    @classmethod
    def check_group(cls, config: Any, group: Group) -> None:
        if config.shortcut != "ms":
            return
        chain = Chain(group)
        for site in group.sites:
            for before in chain.names_before(site.name, 1):
                ranks = config.rank_at(before), config.rank_at(site.name)
                if ranks[0] != ranks[1]:
                    raise RankfoldError(
                        f"ResLoraConfig: rank_pattern gives {before} the rank {ranks[0]} and {site.name}, which is linked to it, "
                        f'{ranks[1]}; shortcut="ms" needs one rank for the whole module type'
                    )

    @classmethod
    def check_site(cls, config: Any, site: Site) -> None:
        if not config.fixed and _is_expert(site):
            raise RankfoldError(
                f"ResLoraConfig: {site.name} is an expert, which sees other tokens than that of the layer before; leave it out of "
                'target_modules, or choose shortcut="bs"'
            )

    @classmethod
    def make_shared(cls, config: Any, group: Group) -> Chain:
        return Chain(group, handing_on=not config.fixed)

    def reset_parameters(self, init: bool | str) -> None:
        first_pair_(self.pair.down, self.pair.up, self.site, random=not init)

    # Block shortcuts --------------------------------------------------------------------------------------------------------

    def blocks(self) -> Sequence[Factors]:
        """Its own pair; with "bs" also those before it, the nearest first, each at its own scale."""
        own = self.pair()
        blocks = [Factors(*own, scale=self.scaling)]
        if self.fixed and self.shared is not None:
            for other in self.shared.before(self.site.name, self.config.links):
                # Of another FSDP unit, where it is sharded now; or on another device
                pair = (
                    gathered(t) if isinstance(t, DTensor) and not isinstance(own[0], DTensor) else t
                    for t in other.pair()
                )
                blocks.append(Factors(*(t.to(own[0].device) for t in pair), scale=other.scaling))
        return blocks

    def terms(self) -> list[Term]:
        """Dropout is inside a block: each draws its own mask."""
        term = self.term()
        return [term._replace(blocks=(block,)) for block in term.blocks] if term.dropout else [term]

    # Input and middle shortcuts ---------------------------------------------------------------------------------------------

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        if self.fixed:
            return super().forward(y, x)
        if vars(self).get("_is_replica"):
            raise RankfoldError(
                f"ResLoraConfig: shortcut={self.config.shortcut!r} cannot run under nn.DataParallel, whose replicas would mix up what "
                'they hand on; use DistributedDataParallel, or choose shortcut="bs"'
            )
        down, up = (t.to(x.dtype) for t in self.pair())
        h = self._middle(x, down) if self.config.shortcut == "ms" else self._of_inputs(x, down)
        return y + (F.linear(h, up) * self.scaling).to(y.dtype)

    def _of_inputs(self, x: Tensor, down: Tensor) -> Tensor:
        """A_n drop(x_n + x_{n−1}); the first module of a run takes its own input twice."""
        received, first_time = self.shared.received(self.site.name, x, 1)
        self._record(first_time, input_norms=x)
        h = F.linear(self.drop(x + (x if received is None else received)), down)
        if received is not None and first_time:
            self.shared.keep(self.site.name, received, x, h)
        return h

    def _middle(self, x: Tensor, down: Tensor) -> Tensor:
        """Σ_k A_{n−k} drop(x_{n−k})."""
        own = F.linear(self.drop(x), down)
        received, first_time = self.shared.received(self.site.name, own, self.config.links)
        self._record(first_time, input_norms=x, middle_norms=own)
        if received is None:
            return own
        h = own + received
        if first_time:
            self.shared.keep(self.site.name, received, own, h)
        return h

    def _record(self, first_time: bool, **found: Tensor) -> None:
        """Remembers the norms of a training forward, of whole micro-batches as the authors' code does."""
        if not (self.training and first_time and torch.is_grad_enabled()):
            return
        for name, t in found.items():
            window = self.get_buffer(name)
            norm = torch.linalg.vector_norm(t.detach(), dtype=torch.promote_types(t.dtype, torch.float32))
            window.copy_(torch.cat([window[1:], norm.to(window)[None]]))
