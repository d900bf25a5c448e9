"""XGBLoRA: gradient boosting with rank-1 LoRAs. Each booster is trained briefly, in a few layers drawn at random, and kept.

Paper: Less is More: extreme gradient boosting of rank-1 adaptations, arXiv 2410.19694. Its body could not be read, and no code was found;
from the abstract and public reviews: rank-1 boosters in a random subset of layers, each merged after a short training, many times.

    W_l ← W_l + s·b·a   for l in S_t, the L_s layers of booster t

OUR INTERPRETATION: a layer is a block of the model with all its target modules; S_t is drawn uniformly, without replacement, for each
booster; κ = 8 steps (NOT FOUND: the paper's); L_s a third of the layers (11 of 32 is reported as best for one model); s = 1;
α_t = 1; no penalty on the norms; one learning-rate schedule over the whole run. Ours: boosters stay factors, and W is not written.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch

from rankfold.errors import RankfoldError
from rankfold.host.registry import Method, register
from rankfold.kernel.layout import Term
from rankfold.methods.chain import Chain
from rankfold.methods.knots import ChainConfig, ChainController, generator


@dataclass
class XgbLoraConfig(ChainConfig):
    """XGBLoRA (arXiv 2410.19694).

    Args:
        layers_drawn: L_s, blocks of the model that a booster trains, ≥ 1; by default a third of those that have a target module.
        link_steps: κ, optimiser steps of a booster; 1 trains b alone.
    """

    method: ClassVar[str] = "xgblora"
    default_length: ClassVar[dict[str, int]] = {"link_steps": 8}
    r: int = field(default=1, metadata={"help": "Rank of a booster."})
    lora_alpha: float = field(default=1, metadata={"help": "Numerator of the scale alpha/r."})
    layers_drawn: int | None = field(
        default=None, metadata={"help": "Layers that each booster trains; default a third of them."}
    )

    note: ClassVar[str | None] = (
        "counted with one booster of every layer; one trains layers_drawn of them, and all of them add up"
    )

    def drawn(self, layers: int) -> int:
        """L_s where so many layers have a target module."""
        return self.layers_drawn or max(round(layers / 3), 1)

    def live(self, sizes: Mapping[str, int]) -> int | None:
        blocks: Counter[str] = Counter()
        for module, size in sizes.items():
            blocks[block_of(module)] += size
        return sum(size for _, size in blocks.most_common(self.drawn(len(blocks))))

    @classmethod
    def fields_at(cls, r: int) -> dict[str, int]:
        return {"r": 1}  # a booster's, whatever the others have

    def check(self) -> None:
        super().check()
        n = self.layers_drawn
        self.require("layers_drawn", n, n is None or n >= 1, "an integer >= 1, or null")


class XgbLora(Chain):
    """It rests where the live booster has not drawn its layer."""

    def terms(self) -> list[Term]:
        return [Term(self.update())] if self.resting else super().terms()


def block_of(module: str) -> str:
    """The block of a model that a module lies in: its name up to the first number, or its own where there is none.

    >>> block_of("model.layers.11.self_attn.q_proj"), block_of("encoder.block.0.layer.1.wi"), block_of("head")
    ('model.layers.11', 'encoder.block.0', 'head')
    """
    found = re.match(r"(?:.*?\.)?\d+(?=\.)", module)
    return found[0] if found else module


class XgbLoraController(ChainController[XgbLora, XgbLoraConfig]):
    """Draws the layers of each booster from the config's seed and the booster's number, so that every process draws the same."""

    def __init__(self, config: XgbLoraConfig, adapters: Sequence[XgbLora], total_steps: int | None) -> None:
        super().__init__(config, adapters, total_steps)
        self.layers = list(dict.fromkeys(block_of(a.site.name) for a in self.adapters))
        self.count = config.drawn(len(self.layers))
        if self.count > len(self.layers):
            raise RankfoldError(
                f"XgbLoraConfig: layers_drawn={self.count} exceeds the {len(self.layers)} layers that have a target module; choose "
                f"layers_drawn <= {len(self.layers)}"
            )
        if any(b - a == 1 for a, b in pairwise([0, *self.positions[:2]])):
            warnings.warn(
                "XgbLoraConfig: boosters of one step train b alone, because a has no gradient while b is 0; choose link_steps >= 2",
                stacklevel=2,
            )
        self.begin()

    def begin(self) -> None:
        order = torch.randperm(len(self.layers), generator=generator(self.config.seed, "layers", self.link))
        drawn = {self.layers[i] for i in order[: self.count].tolist()}
        for a in self.adapters:
            a.resting = block_of(a.site.name) not in drawn

    def trained(self) -> Sequence[XgbLora]:
        return [a for a in self.adapters if not a.resting]

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        for a in self.adapters:
            if a.resting and any(p.grad is not None for p in a.parameters()):
                raise RankfoldError(
                    f"XgbLoraConfig: {a.site.name} has a gradient, and the live booster does not train it; load the optimiser's state "
                    "before attach(model, optimizer), and call zero_grad(set_to_none=True) after each step"
                )
        super().before_step(optimizer)

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.begin()

    def release(self) -> None:
        for a in self.adapters:
            a.resting = False


XGBLORA = register(
    Method(
        name="xgblora",
        title="XGBLoRA",
        paper="2410.19694",
        summary="Gradient boosting: rank-1 LoRAs, each trained for a few steps in some layers drawn at random, add up.",
        config=XgbLoraConfig,
        adapter=XgbLora,
        controller=XgbLoraController,
        folds_at="boosters of a layer, times r",
        example={"r": 1, "lora_alpha": 1, "link_steps": 8},
    )
)
