"""ResLoRA: identity shortcuts between the LoRA blocks of one module type, so that gradients skip the frozen network.

Paper: ResLoRA, Identity Residual Mapping in Low-Rank Adaption, arXiv 2402.18039 (Findings of ACL 2024). n counts the adapted modules
of one type in depth order, x_n is the input of module n and h_n what its adapter adds to W_n x_n:

    "is", input shortcut     h_n = s·B_n A_n (x_n + x_{n−1}),  the first module: s·B_0 A_0 (2·x_0)
    "bs", block shortcut     h_n = s·Σ_{k=0…m} B_{n−k} A_{n−k} x_n
    "ms", middle shortcut    h_n = s·B_n Σ_{k=0…m} A_{n−k} x_{n−k}

Nothing is detached: the gradient that reaches earlier layers through a shortcut is the point. W_n never sees it.

From the authors' code: s = α/r, Kaiming A and B = 0, where dropout sits (is: on the sum; bs: a mask for each block; ms: on each
x_{n−k} once), m clipped at the chain's start, −1 for all. "bs" is a fixed matrix of rank (m+1)·r; "is" and "ms" depend on the input of
other layers, and what comes near them is in res_lora_merge.py.

OUR INTERPRETATION: "bs" and m = 1 by default; a module type is its name without the depth; a chain is cut where the shape changes;
blocks of other ranks or alphas ("bs") keep their own s.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from rankfold.host.config import LowRankConfig, is_whole
from rankfold.host.registry import Method, register
from rankfold.methods.res_lora_adapter import ResLora
from rankfold.methods.res_lora_merge import approximate

#: More than any model has.
ALL = 1_000_000
SHORTCUTS = ("is", "bs", "ms")


@dataclass
class ResLoraConfig(LowRankConfig):
    """ResLoRA (arXiv 2402.18039).

    Args:
        shortcut: "is", "bs" or "ms": between inputs, blocks, or what A makes of them.
        previous: m, how many modules before are linked; -1: all. With "is" it is 1.
    """

    method: ClassVar[str] = "res_lora"
    approximations: ClassVar[tuple[str, ...]] = ("bi", "bw")
    shortcut: str = field(default="bs", metadata={"help": '"is", "bs" or "ms"; only "bs" merges and folds exactly.'})
    previous: int = field(default=1, metadata={"help": 'Linked modules of the same type before; -1: all. "is": 1.'})

    def check(self) -> None:
        super().check()
        self.require("shortcut", self.shortcut, self.shortcut in SHORTCUTS, '"is", "bs" or "ms"')
        self.require("previous", self.previous, is_whole(self.previous) and self.previous >= -1, "an integer >= -1")
        one = self.shortcut != "is" or self.previous == 1
        self.require("previous", self.previous, one, '1 with shortcut="is", which links the module before')

    @property
    def links(self) -> int:
        """How many modules before a module are linked to it, where there are so many."""
        return self.previous if self.previous >= 0 else ALL

    @property
    def fixed(self) -> bool:
        return self.shortcut == "bs" or self.links == 0

    def ranks(self) -> dict[str, int]:
        return {"r": self.r, "previous": self.previous}


RES_LORA = register(
    Method(
        name="res_lora",
        title="ResLoRA",
        paper="2402.18039",
        summary="Identity shortcuts between LoRA blocks of neighbouring layers.",
        config=ResLoraConfig,
        adapter=ResLora,
        folds_at="(m+1)*r",
        approximate=approximate,
        variants={
            "res_lora bs": {"shortcut": "bs"},
            "res_lora is": {"shortcut": "is"},
            "res_lora ms": {"shortcut": "ms"},
        },
    )
)
