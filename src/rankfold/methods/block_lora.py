"""Block-LoRA: LoRA's ranks in n blocks that share one down-projection and keep an up-projection each.

Paper: One Head Eight Arms, Block Matrix based Low Rank Adaptation for CLIP-based Few-Shot Learning, arXiv 2501.16720. Only its
abstract and machine-written summaries could be read, and there is no public code. With n blocks of r/n ranks, in our layout:

    ΔW = s · Σ_i B_i A_s = s · (B_1 + … + B_n) · A_s        A_s (r/n) × in,   B_i out × (r/n)

From the abstract: low-rank matrices in blocks, one of which is shared; fewer parameters; a product becomes a sum. From the
summaries: both factors are split, B's blocks stand one behind the other along the rank, and all A_i become A_s.

OUR INTERPRETATION is everything else: `block_axis="rank"`, the reading above. The other reading, `block_axis="input"`, shares
one block A_s (r × in/n) among n slices of the input, ΔW = s · B · [A_s … A_s] with B out × r: as many parameters, and a sum too,
but B is not split. First values as LoRA's: A_s Kaiming, B_i = 0. s = α/√r of the whole r, which is the rule of CLIP-LoRA, the
baseline that the paper compares with; use_rslora=False makes it α/r. Two blocks, since no number of blocks is known.

The arms B_i all get one and the same gradient. So from equal first values any optimiser that treats tensors apart keeps them
equal, and training is that of a LoRA of rank r/n with a learning rate of B that is n times as high.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import nn

from rankfold.errors import RankfoldError
from rankfold.host.adapter import Adapter, Site, first_pair_
from rankfold.host.config import LowRankConfig, is_whole
from rankfold.host.registry import Method, register
from rankfold.kernel.factors import Factors


@dataclass
class BlockLoraConfig(LowRankConfig):
    """Block-LoRA (arXiv 2501.16720); most of it is our interpretation, see `rankfold docs block_lora`.

    Args:
        blocks: n; divides r, and with block_axis="input" every module's inputs.
        block_axis: "rank" or "input", along which A is shared.
        use_rslora: the scale α/√r, unlike elsewhere by default.
    """

    method: ClassVar[str] = "block_lora"
    note: ClassVar[str] = "its arms take equal steps: compare it with LoRA of rank r/n and B's learning rate times n"
    use_rslora: bool = field(default=True, metadata={"help": "Scale by alpha/sqrt(r), as CLIP-LoRA; false: alpha/r."})
    blocks: int = field(default=2, metadata={"help": "Blocks that share one down-projection; divides r."})
    block_axis: str = field(default="rank", metadata={"help": '"rank", or "input": what the blocks are cut along.'})

    def check(self) -> None:
        super().check()
        self.require("blocks", self.blocks, is_whole(self.blocks) and self.blocks > 0, "an integer > 0")
        self.require("block_axis", self.block_axis, self.block_axis in ("rank", "input"), '"rank" or "input"')
        for name, r in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            fits = self.block_axis == "input" or r % self.blocks == 0
            self.require("blocks", self.blocks, fits, f"a divisor of {name}={r}")

    def with_rank(self, n: int) -> Self:
        """The nearest rank above that the blocks divide."""
        step = self.blocks if self.block_axis == "rank" else 1
        return super().with_rank(-(-n // step) * step)

    def ranks(self) -> dict[str, int]:
        return {"r": self.r, "blocks": self.blocks}


class BlockLora(Adapter):
    def __init__(self, config: BlockLoraConfig, site: Site, shared: nn.Module | None = None) -> None:
        super().__init__(config, site, shared)
        self.by_rank, self.arms = config.block_axis == "rank", config.blocks
        rank, inputs = self.r, site.in_features
        if self.by_rank:
            rank //= self.arms
        else:
            inputs //= self.arms
        self.down = nn.Parameter(torch.empty(rank, inputs))  # A_s
        self.up = nn.Parameter(torch.empty(site.out_features, self.r))  # [B_1 … B_n]

    @classmethod
    def check_site(cls, config: BlockLoraConfig, site: Site) -> None:
        if config.block_axis == "input" and site.in_features % config.blocks:
            raise RankfoldError(
                f"BlockLoraConfig: blocks={config.blocks} must be a divisor of the {site.in_features} inputs of {site.name}; "
                'choose another, or block_axis="rank"'
            )

    def reset_parameters(self, init: bool | str) -> None:
        first_pair_(self.down, self.up, self.site, random=not init)

    def blocks(self) -> Sequence[Factors]:
        if self.by_rank:
            return (Factors(self.down, self.up.unflatten(1, (self.arms, -1)).sum(1), scale=self.scaling),)
        return (Factors(self.down.repeat(1, self.arms), self.up, scale=self.scaling),)


BLOCK_LORA = register(
    Method(
        name="block_lora",
        title="Block-LoRA",
        paper="2501.16720",
        summary="n blocks of ranks share one down-projection; folds at r/n. Mostly our interpretation.",
        config=BlockLoraConfig,
        adapter=BlockLora,
        folds_at="r/n",
    )
)
