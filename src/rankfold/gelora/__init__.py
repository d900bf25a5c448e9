"""GeLoRA: ranks before training, from the geometry of hidden states."""

from rankfold.gelora.dimension import two_nn
from rankfold.gelora.ranks import GeloraPlan, assign_ranks, gelora_plan, gelora_ranks
from rankfold.gelora.states import Dimensions, intrinsic_dimensions

__all__ = [
    "Dimensions",
    "GeloraPlan",
    "assign_ranks",
    "gelora_plan",
    "gelora_ranks",
    "intrinsic_dimensions",
    "two_nn",
]
