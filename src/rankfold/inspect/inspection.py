"""What was found: an adapter's updates, and a run's ranks over its steps. The views of both import this file.

All numbers are of ΔW itself, gate and scale included. Effective rank is Roy and Vetterli's (EUSIPCO 2007), exp of the entropy
of σ/Σσ; stable rank is ‖ΔW‖²_F/σ₁²; the energy rank is the least number of σ that hold 99 % of ‖ΔW‖²_F.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property

from rankfold.inspect.grid import Grid, grid
from rankfold.io.files import to_json

ENERGY = 0.99


@dataclass(frozen=True)
class ModuleUpdate:
    """The update of one weight.

    Args:
        module: its name.
        out, into: the weight's shape.
        start: components that the adapter has.
        rank: those that are not zero.
        sigma: the singular values of ΔW, descending.
    """

    module: str
    out: int
    into: int
    start: int
    rank: int
    sigma: tuple[float, ...]

    @property
    def norm(self) -> float:
        """‖ΔW‖_F."""
        return math.sqrt(sum(s * s for s in self.sigma))

    @property
    def effective_rank(self) -> float:
        total = sum(self.sigma)
        shares = [s / total for s in self.sigma if s > 0] if total > 0 else []
        return math.exp(-sum(p * math.log(p) for p in shares)) if shares else 0.0

    @property
    def stable_rank(self) -> float:
        return (self.norm / self.sigma[0]) ** 2 if self.norm > 0 else 0.0

    @property
    def energy_rank(self) -> int:
        kept, total = 0.0, self.norm**2
        for i, s in enumerate(self.sigma, 1):
            kept += s * s
            if total > 0 and kept >= ENERGY * total:
                return i
        return 0


@dataclass(frozen=True)
class Link:
    """A finished link of a chain, as its knot recorded it.

    Args:
        step: after which it was tied.
        rank: of all modules together.
        norm: ‖ΔW‖_F of the link alone, of all modules together.
    """

    step: int
    rank: int
    norm: float


@dataclass(frozen=True)
class Inspection:
    """An adapter, looked at.

    Args:
        name: what was looked at, for titles.
        method: what the adapter is.
        updates: in the model's order.
        left_out: what else the adapter trains, and is not shown.
        links: of a chain, those that are finished, in their order.
    """

    name: str
    method: str
    updates: tuple[ModuleUpdate, ...]
    left_out: tuple[str, ...] = ()
    links: tuple[Link, ...] = ()

    @cached_property
    def grid(self) -> Grid:
        return grid(u.module for u in self.updates)

    @property
    def rank(self) -> int:
        """Components kept, of all updates together."""
        return sum(u.rank for u in self.updates)

    @property
    def start(self) -> int:
        return sum(u.start for u in self.updates)

    @property
    def norm(self) -> float:
        """Of all updates together."""
        return math.sqrt(sum(u.norm**2 for u in self.updates))

    @property
    def parameters(self) -> int:
        """Parameters of the plain LoRA that holds just the kept components."""
        return sum(u.rank * (u.out + u.into) for u in self.updates)

    def to_json(self) -> str:
        derived = ("norm", "effective_rank", "stable_rank", "energy_rank")
        updates = [{**asdict(u), **{key: getattr(u, key) for key in derived}} for u in self.updates]
        whole = {
            key: getattr(self, key) for key in ("name", "method", "rank", "start", "norm", "parameters", "left_out")
        }
        links = {"links": [asdict(link) for link in self.links]} if self.links else {}
        return to_json({**whole, **links, "updates": updates})


@dataclass(frozen=True)
class RankHistory:
    """Ranks over training steps.

    Args:
        name: of the run, for titles.
        steps: at which they were logged, ascending.
        ranks: by module, one for each step.
    """

    name: str
    steps: tuple[int, ...]
    ranks: dict[str, tuple[int, ...]]

    @cached_property
    def grid(self) -> Grid:
        return grid(self.ranks)

    @property
    def total(self) -> tuple[int, ...]:
        """Of all modules together."""
        return tuple(map(sum, zip(*self.ranks.values(), strict=True)))

    def by_kind(self) -> dict[str, tuple[int, ...]]:
        """Total of each kind of module, one for each step."""
        found: dict[str, list[tuple[int, ...]]] = {}
        for name, ranks in self.ranks.items():
            found.setdefault(self.grid.columns[self.grid.cells[name][1]], []).append(ranks)
        return {kind: tuple(map(sum, zip(*members, strict=True))) for kind, members in found.items()}

    def to_json(self) -> str:
        return to_json({**asdict(self), "total": self.total})
