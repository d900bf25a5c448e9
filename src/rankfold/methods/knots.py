"""When a link ends, and what happens then: the config and the controller that COLA, RAC-LoRA and XGBLoRA have in common.

A knot freezes the live pair, gives it a new link's first values and forgets its optimiser state, step count included. The function
that the model computes does not change at a knot, because one factor of a new link is zero.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch

from rankfold.control.controller import Controller, finite
from rankfold.errors import RankfoldError
from rankfold.host.config import LowRankConfig
from rankfold.kernel.factors import Factors
from rankfold.methods.chain import Chain


@dataclass
class ChainConfig(LowRankConfig):
    """Of a method that trains one link after another.

    Args:
        links: links of equal length that the run is divided into; 1 ≤ links ≤ optimiser steps.
        link_steps: instead, optimiser steps of a link; the last one may be shorter.
        link_shares: instead, the share of the run that each link gets; they add up to 1.
        rewarm_steps: steps over which the learning rate rises again behind each knot.
        restart_schedule: "none": the run's own schedule goes on; "linear" or "cosine": multiply it by one that falls to 0 within
            each link; "hold": the rate stays what it was at the first knot.
        links_limit: frozen rank per module from which its links are re-factored; by default min(in, out)/2.
        links_error: what each re-factoring may lose, relative in the Frobenius norm.
        seed: of the first values of every link but the first, which torch's own generator draws.
    """

    links: int | None = field(
        default=None, metadata={"help": "Links of equal length that the run is divided into; default: see the method."}
    )
    link_steps: int | None = field(default=None, metadata={"help": "Instead of links: optimiser steps of a link."})
    link_shares: list[float] | None = field(
        default=None, metadata={"help": "Instead of links: share of the run of each link; they add up to 1."}
    )
    rewarm_steps: int = field(
        default=0, metadata={"help": "Steps over which the learning rate rises again behind each knot."}
    )
    restart_schedule: Literal["none", "linear", "cosine", "hold"] = field(
        default="none",
        metadata={
            "help": "Learning rate within a link: the run's own; times linear or cosine; or held from the first knot on."
        },
    )
    links_limit: int | None = field(
        default=None,
        metadata={"help": "Frozen rank per module from which links are re-factored; default min(in, out)/2."},
    )
    links_error: float = field(
        default=0.0, metadata={"help": "Relative error that each re-factoring may make; 0: rounding alone."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the first values of every link but the first."})

    note: ClassVar[str | None] = (
        "trains one link at a time; file and fold are those of the whole chain, without re-factoring"
    )
    #: What is set where none of links, link_steps and link_shares is.
    default_length: ClassVar[dict[str, int]] = {"links": 3}

    def __post_init__(self) -> None:
        if self.links is None and self.link_steps is None and self.link_shares is None:
            for name, value in self.default_length.items():
                setattr(self, name, value)
        super().__post_init__()

    def check(self) -> None:
        super().check()
        for name in ("links", "link_steps", "links_limit"):
            value = getattr(self, name)
            self.require(name, value, value is None or value >= 1, "an integer >= 1, or null")
        given = [n for n in ("links", "link_steps", "link_shares") if getattr(self, n) is not None]
        self.require(given[-1], getattr(self, given[-1]), len(given) == 1, f"null where {given[0]} is given")
        shares = self.link_shares
        good = shares is None or (all(s > 0 for s in shares) and math.isclose(sum(shares), 1.0, abs_tol=1e-6))
        self.require("link_shares", shares, good, "numbers > 0 that add up to 1")
        self.require("rewarm_steps", self.rewarm_steps, self.rewarm_steps >= 0, "an integer >= 0")
        self.require("links_error", self.links_error, 0 <= self.links_error < 1, "a number in [0, 1)")

    @classmethod
    def planned(cls, **fields: Any) -> ChainConfig:
        """Counts all links where their number is known."""
        config = cls(**fields)
        vars(config)["planned_links"] = (expected_links(config) or 1) - 1
        return config

    def live(self, sizes: Mapping[str, int]) -> int | None:
        return sum(sizes.values())

    def parts(self) -> int | None:
        return expected_links(self)


def expected_links(config: ChainConfig) -> int | None:
    """How many links a chain has, or None where the length of the run decides."""
    return config.links if config.link_shares is None else len(config.link_shares)


def positions(config: ChainConfig, total_steps: int | None) -> Sequence[int]:
    """The steps after which a knot is tied, ascending; none at the end of the run.

    Raises:
        RankfoldError: a run that is too short for its links, or whose length must be known and is not.
    """
    title, n = type(config).__name__, config.link_steps
    if n is not None:
        if total_steps and n > total_steps:
            raise RankfoldError(
                f"{title}: link_steps={n} is longer than the run of {total_steps} steps; choose link_steps <= {total_steps}"
            )
        return range(n, total_steps or sys.maxsize, n)
    count = expected_links(config)
    assert count is not None
    shares = config.link_shares or [1 / count] * count
    if count == 1:
        return []
    if not total_steps:
        raise RankfoldError(
            f"{title}: {count} links need the length of the run; give attach(total_steps=...), or link_steps in the config"
        )
    ends = [round(total_steps * share) for share in itertools.accumulate(shares)]
    if any(end <= start for start, end in itertools.pairwise([0, *ends])):
        name = "links" if config.link_shares is None else "link_shares"
        raise RankfoldError(
            f"{title}: {name}={getattr(config, name)!r} leaves a link without a step in a run of {total_steps} steps; choose fewer "
            "links, or train longer"
        )
    return ends[:-1]


def generator(*key: int | str) -> torch.Generator:
    """On the CPU, the same for the same key on every process and in every run."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


A = TypeVar("A", bound=Chain)
C = TypeVar("C", bound=ChainConfig)


class ChainController(Controller[A, C], Generic[A, C]):
    """Ties the knots.

    `state["chain"]` has what grows with the chain: every finished link's step, rank (all modules together) and Frobenius norm; the
    frozen rank of each module, now and before this chain; the learning rates at the first knot; the largest error of a re-factoring.
    """

    def __init__(self, config: C, adapters: Sequence[A], total_steps: int | None) -> None:
        super().__init__(config, adapters, total_steps)
        self.positions = positions(config, total_steps)
        for a in self.adapters:
            a.drop_empty_links()
        # `before` tells the draws of a chain that goes on behind another from the other's
        before = {a.site.name: a.frozen_rank for a in self.adapters}
        self.state["chain"] = {
            "links": [], "ranks": self._frozen_ranks(), "before": before, "rates": [], "error": 0.0
        }  # fmt: skip
        self._rates: list[tuple[dict[str, Any], Any]] = []

    @property
    def chain(self) -> dict[str, Any]:
        return self.state["chain"]

    @property
    def link(self) -> int:
        """The number of the live link, from 0."""
        return len(self.chain["links"])

    def _frozen_ranks(self) -> list[int]:
        return [a.frozen_rank for a in self.adapters]

    # Around a step ----------------------------------------------------------------------------------------------------

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._frozen_ranks() != self.chain["ranks"]:
            raise RankfoldError(
                f"{type(self.config).__name__}: the adapter's links have {sum(self._frozen_ranks())} components, and the optimiser's "
                f"state is of a chain whose links have {sum(self.chain['ranks'])}; load both from the same checkpoint"
            )
        if self.config.restart_schedule == "none" and not self.config.rewarm_steps:
            return
        for index, group in enumerate(self._groups(optimizer)):
            rate = self.rate(group["lr"], index)
            self._rates.append((group, group["lr"]))
            group["lr"] = rate

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        for group, rate in self._rates:  # as the scheduler left it: some compute the next rate from this one
            group["lr"] = rate
        self._rates = []
        if self.step in self.positions:
            if self.config.restart_schedule == "hold" and not self.link:
                self.chain["rates"] = [float(group["lr"]) for group in self._groups(optimizer)]
            self.tie(optimizer)

    def tie(self, optimizer: torch.optim.Optimizer) -> None:
        """Ends the live link and begins the next."""
        link, squares, rank = self.link, 0.0, 0
        for a in self.trained():
            done = a.finished(link)
            norm = finite(f"{type(self.config).__name__}: link {link + 1} at {a.site.name}", done.norm()) * a.scaling
            squares, rank = squares + float(norm) ** 2, rank + done.rank
            self.freeze(a, done)
            for p in a.parameters():
                optimizer.state.pop(p, None)
        self.chain["links"].append({"step": self.step, "rank": rank, "norm": math.sqrt(squares)})
        self.chain["ranks"] = self._frozen_ranks()
        for a in self.trained():
            name = a.site.name
            a.start(self.link, generator(self.config.seed, name, self.link, self.chain["before"][name]))
        self.begin()

    def freeze(self, adapter: A, done: Factors) -> None:
        """Adds a finished link, and re-factors all of them where their summed rank passes the limit, or again a multiple of it: a
        chain of full rank is left in peace for as many links as it takes to grow by one more limit."""
        c = self.config
        limit = c.links_limit or max(min(adapter.site.in_features, adapter.site.out_features) // 2, 1)
        before = adapter.frozen_rank
        adapter.add_link(done)
        if max(before - 1, 0) // limit < (adapter.frozen_rank - 1) // limit:
            self.chain["error"] = max(self.chain["error"], adapter.compact(c.links_error))

    # What a method says ---------------------------------------------------------------------------------------------------

    def trained(self) -> Sequence[A]:
        """The adapters whose pair the live link trains."""
        return self.adapters

    def begin(self) -> None:
        """Prepares what the live link trains; called at each knot, once all pairs have their first values."""

    # The learning rate ------------------------------------------------------------------------------------------------------

    def _groups(self, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        own = {id(p) for a in self.adapters for p in a.parameters()}
        return [g for g in optimizer.param_groups if any(id(p) in own for p in g["params"])]

    def rate(self, lr: Any, group: int) -> Any:
        """The learning rate of the coming step, where the run's schedule says `lr`."""
        c = self.config
        tied = [link["step"] for link in self.chain["links"]]
        start = tied[-1] if tied else 0
        done = self.step - start
        if c.restart_schedule == "hold" and tied:
            lr = self.chain["rates"][group]
        elif c.restart_schedule in ("linear", "cosine"):
            passed = done / (self._end(start) - start)
            lr = lr * (1 - passed if c.restart_schedule == "linear" else (1 + math.cos(math.pi * passed)) / 2)
        if tied and done < c.rewarm_steps:
            lr = lr * (done + 1) / (c.rewarm_steps + 1)
        return lr

    def _end(self, start: int) -> int:
        """The step after which the link ends that began after step `start`."""
        later = next((k for k in self.positions if k > start), None)
        return later or self.total_steps or sys.maxsize

    # Resuming ---------------------------------------------------------------------------------------------------------------

    def load_state(self, state: dict[str, Any]) -> None:
        chain = state.get("chain")
        if isinstance(chain, dict) and chain.keys() == self.chain.keys():
            self.state["chain"] = chain  # its lists grow, so they cannot have the lengths of ours
        super().load_state(state)
        tied = [link["step"] for link in self.chain["links"]]
        due = list(itertools.takewhile(lambda step: step <= self.step, self.positions))
        if tied != due:
            raise RankfoldError(
                f"{type(self.config).__name__}: the optimiser's checkpoint is of another chain, which tied its knots after steps "
                f"{tied}, where this one ties them after {due}; resume with the config and the length of run it was saved with"
            )

    def progress(self) -> dict[str, Any]:
        return super().progress() | {"links": [*self.chain["links"]], "error": self.chain["error"]}

    def finished(self) -> bool:
        """Whether no knot is to come, as far as the length of the run is known."""
        return not any(step > self.step for step in self.positions[-1:]) if self.total_steps else True
