"""Options of the optimisers: dataclasses whose fields have a default, a help text and a check, as the configs of methods do."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field, fields
from typing import Any, Self

from rankfold.errors import RankfoldError


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Options:
    """The options that all optimisers share, besides the model and `lr`. Each optimiser extends them."""

    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata={"help": "Decay of both moments."})
    eps: float = field(default=1e-8, metadata={"help": "Added to the root of the second moment."})
    weight_decay: float = field(
        default=0.0, metadata={"help": "Decoupled weight decay of all matrices that are trained."}
    )
    plain_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of what is not a pair (heads, gates, norms); null: lr."}
    )

    def __post_init__(self) -> None:
        betas = self.betas
        ok = isinstance(betas, list | tuple) and len(betas) == 2 and all(is_number(b) and 0 <= b < 1 for b in betas)
        self.require("betas", ok, "two values in [0, 1)")
        object.__setattr__(self, "betas", tuple(float(b) for b in betas))
        self.require("eps", is_number(self.eps) and self.eps >= 0, "a number >= 0")
        self.require("weight_decay", is_number(self.weight_decay) and self.weight_decay >= 0, "a number >= 0")
        self.require("plain_lr", self.plain_lr is None or (is_number(self.plain_lr) and self.plain_lr >= 0), "a number >= 0, or null for lr")  # fmt: skip

    @property
    def takes_clipping(self) -> bool:
        """Whether a trainer's clipping, by the norm of the factors' raw gradients, suits the step; if not, it is off by default."""
        return True

    @classmethod
    def title(cls) -> str:
        return cls.__name__.removesuffix("Options")

    def require(self, name: str, ok: bool, allowed: str) -> None:
        """Raises RankfoldError, naming field, value and what is allowed, unless `ok`."""
        if not ok:
            raise RankfoldError(f"{self.title()}: {name}={getattr(self, name)!r} must be {allowed}")

    @classmethod
    def of(cls, given: dict[str, Any]) -> Self:
        """The options `given`, the rest at their defaults; raises RankfoldError for one that does not exist."""
        names = [f.name for f in fields(cls)]
        for name in given:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "there are " + ", ".join(names)
                raise RankfoldError(f"{cls.title()}: option {name}={given[name]!r} is not known; {hint}")
        return cls(**given)


def check_lr(title: str, lr: float) -> None:
    """Raises RankfoldError where `lr` is not a learning rate."""
    if not (is_number(lr) and lr >= 0):
        raise RankfoldError(f"{title}: lr={lr!r} must be a number >= 0")
