"""TiedAdapter: what an output head has where its weight is that of the embedding, and `ensure_weight_tying` adapts both as one."""

from __future__ import annotations

from collections.abc import Sequence

from rankfold.host.adapter import Adapter, Site
from rankfold.host.config import LowRankConfig
from rankfold.kernel.factors import Factors


class TiedAdapter(Adapter):
    """The embedding's update, read from the other side. It has no parameters of its own, and nothing to merge: what is merged into
    the embedding lies in the head's weight as well.

    Args:
        source: the embedding's adapter, vocabulary × dim on the way in, dim × rank on the way out.
    """

    def __init__(self, config: LowRankConfig, site: Site, source: Adapter) -> None:
        super().__init__(config, site)
        self._source = (source,)  # out of the module registry: the embedding owns it
        self.has_schedule = False

    def blocks(self) -> Sequence[Factors]:
        source = self._source[0]
        blocks = [b.detach() if source.resting else b for b in source.blocks()]
        return [Factors(b.up.T, b.down.T, b.gate, b.scale) for b in blocks]
