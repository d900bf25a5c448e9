"""Plain LoRA inside our core: the baseline that every other method and PEFT's own LoRA are compared with.

Paper: LoRA, arXiv 2106.09685, ΔW = (α/r)·B·A; A Kaiming-uniform (a = √5), B = 0, as PEFT does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from rankfold.host.adapter import Adapter, Site, first_pair_
from rankfold.host.config import LowRankConfig
from rankfold.host.registry import Method, register
from rankfold.kernel.factors import Factors


@dataclass
class PlainLoraConfig(LowRankConfig):
    """LoRA (arXiv 2106.09685) as rankfold runs it. PEFT's own is `peft.LoraConfig`.

    `init_lora_weights`: True, "gaussian" (A ~ N(0, 1/r²), as PEFT), or False (random A and B, for tests).
    """

    method: ClassVar[str] = "lora"
    inits: ClassVar[tuple[str, ...]] = ("gaussian",)


class Lora(Adapter):
    stackable = True

    def __init__(self, config: LowRankConfig, site: Site, shared: nn.Module | None = None) -> None:
        super().__init__(config, site, shared)
        self.down = nn.Parameter(torch.empty(self.r, site.in_features))  # A
        self.up = nn.Parameter(torch.empty(site.out_features, self.r))  # B

    def reset_parameters(self, init: bool | str) -> None:
        if init == "gaussian" and self.site.kind != "embedding":
            nn.init.normal_(self.down, std=1 / self.r)
            nn.init.zeros_(self.up)
        else:
            first_pair_(self.down, self.up, self.site, random=init is False)

    def blocks(self) -> Sequence[Factors]:
        return (Factors(self.down, self.up, scale=self.scaling),)


LORA = register(
    Method(
        name="lora",
        title="LoRA",
        paper="2106.09685",
        summary="One low-rank pair per layer; the baseline.",
        config=PlainLoraConfig,
        adapter=Lora,
    )
)
