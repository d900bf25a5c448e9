"""How PEFT's LoRA names and shapes the tensors of each kind of module: k×k down and 1×1 up of a convolution, tables of embeddings.

tensors_of(site, factors)            # {"base_model.model.<site>.lora_A.weight": ..., ...}
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from rankfold.errors import RankfoldError
from rankfold.fold.source import Source
from rankfold.host.adapter import Site
from rankfold.host.kinds import kind_named
from rankfold.kernel.factors import Factors


def tensors_of(site: Site, factors: Factors) -> dict[str, Tensor]:
    """A module's two tensors by their keys in an adapter's file.

    Args:
        factors: gate and scale baked in, or left to the reader.
    """
    down, up = factors.down, factors.up  # rank × in, out × rank
    if site.kernel:
        channels = site.in_features // math.prod(site.kernel)
        down, up = down.reshape(len(down), channels, *site.kernel), up.reshape(*up.shape, *[1] * len(site.kernel))
    return dict(zip(_keys(site), (down.contiguous(), up.contiguous()), strict=True))


def factors_of(site: Site, tensors: Mapping[str, Tensor], scale: float = 1.0) -> Factors:
    """A module's factors, read back from a file's tensors."""
    down, up = (tensors[key].flatten(1) for key in _keys(site))
    return Factors(down, up, scale=scale)


def _keys(site: Site) -> list[str]:
    return [f"base_model.model.{site.name}.{key}" for key in kind_named(site.kind).keys]


def check_kinds(source: Source, profile: str) -> None:
    """Raises RankfoldError for modules of which the format has no LoRA."""
    others = [site.name for site in source.sites if not kind_named(site.kind).linear]
    if others and profile in ("gguf", "mlx"):
        raise RankfoldError(
            f"target_modules: {others[0]} is not a linear layer, and profile {profile} writes the LoRA of no other; fold with profile "
            "uniform or compact, which PEFT loads, or merged"
        )
    if source.unlike_peft and profile != "merged":
        raise RankfoldError(
            f"target_modules: {source.unlike_peft[0]} is a convolution with groups, dilation or padding other than zeros, of which "
            "PEFT's LoRA computes something else; fold with profile merged"
        )
