"""How PEFT's LoRA names and shapes the tensors of each kind of module: k×k down and 1×1 up of a convolution, tables of embeddings,
the experts of one parameter in one pair.

    layout = Layout(sites)
    layout.tensors(factors)              # {"base_model.model.<module>.lora_A.weight": ..., ...}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rankfold.errors import RankfoldError
from rankfold.fold.source import Source
from rankfold.host.adapter import Site
from rankfold.host.kinds import kind_named
from rankfold.kernel.factors import Factors


class Layout:
    """The tensors of a file for all sites of an adapter.

    PEFT wraps a module once for each adapted parameter, in their order, and the last wrapper is outermost: so the first
    parameter's tensors have a `base_layer` more in their name than the second's. Its `lora_A` holds the experts' rows one expert
    after the other, its `lora_B` their columns rank by rank.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self.stacks: dict[str, list[Site]] = {}  # by parameter or module
        for site in sites:
            self.stacks.setdefault(parameter_of(site), []).append(site)
        self.of = {site.name: name for name, stack in self.stacks.items() for site in stack}
        self.prefix = {name: name for name in self.stacks}
        within: dict[str, list[str]] = {}
        for name, (first, *_) in self.stacks.items():
            if first.kind in ("experts", "parameter"):
                within.setdefault(name.rpartition(".")[0], []).append(name)
        for module, names in within.items():
            for depth, name in enumerate(reversed(names)):
                self.prefix[name] = module + ".base_layer" * depth

    def keys(self, name: str) -> list[str]:
        ends = kind_named(self.stacks[name][0].kind).keys
        return [f"base_model.model.{self.prefix[name]}.{end}" for end in ends]

    def tensors(self, factors: Mapping[str, Factors]) -> dict[str, Tensor]:
        """All tensors by their keys.

        Args:
            factors: by site, those of one parameter of one rank; gate and scale baked in, or left to the reader.
        """
        found: dict[str, Tensor] = {}
        for name, stack in self.stacks.items():
            parts = [factors[site.name] for site in stack]
            down = torch.cat([f.down for f in parts])  # rank × in, of one expert after the other
            up = torch.stack([f.up for f in parts], dim=-1).flatten(1)  # out × rank, experts side by side
            for (key, shape), tensor in zip(self.shapes(name, parts[0].rank).items(), (down, up), strict=True):
                found[key] = tensor.reshape(shape).contiguous()
        return found

    def shapes(self, name: str, rank: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors of one parameter or module, by their keys."""
        site, rows = self.stacks[name][0], rank * len(self.stacks[name])
        inputs = (site.in_features // math.prod(site.kernel), *site.kernel) if site.kernel else (site.in_features,)
        down, up = self.keys(name)
        return {down: (rows, *inputs), up: (site.out_features, rows, *[1] * len(site.kernel or ()))}

    def views(self, site: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A site's `down` and `up` in a file's tensors."""
        name = self.of[site]
        stack = self.stacks[name]
        index = [one.name for one in stack].index(site)
        down, up = (tensors[key].flatten(1) for key in self.keys(name))
        return down.chunk(len(stack))[index], up.unflatten(1, (-1, len(stack)))[..., index]

    def factors(self, site: str, tensors: Mapping[str, Tensor], scale: float = 1.0) -> Factors:
        """A site's factors, read back from a file's tensors."""
        return Factors(*self.views(site, tensors), scale=scale)

    def parameters(self) -> list[str]:
        """The names of adapted parameters."""
        return [name for name, stack in self.stacks.items() if stack[0].kind in ("experts", "parameter")]


def parameter_of(site: Site) -> str:
    """The name of a site's module, or of its parameter, where that is adapted."""
    if site.kind != "experts":
        return site.name
    module, _, parameter = site.name.rsplit(".", 2)
    return f"{module}.{parameter}"


def check_kinds(source: Source, profile: str) -> None:
    """Raises RankfoldError for modules of which the format has no LoRA."""
    others = [site.name for site in source.sites if not kind_named(site.kind).linear]
    if others and profile in ("gguf", "mlx"):
        raise RankfoldError(
            f"{others[0]} is not a linear layer, and profile {profile} writes the LoRA of no other; fold with profile uniform, which "
            "PEFT loads"
        )
    parameters = [site.name for site in source.sites if site.kind in ("experts", "parameter")]
    if parameters and profile not in ("uniform", "per_expert"):
        raise RankfoldError(
            f"target_parameters: profile {profile} has no place for {parameters[0]}; fold with profile uniform, or save what "
            "merge_and_unload() gives"
        )
    if source.unlike_peft and profile != "merged":
        raise RankfoldError(
            f"target_modules: {source.unlike_peft[0]} is a convolution with groups, dilation or padding other than zeros, of which "
            "PEFT's LoRA computes something else; fold with profile merged"
        )
