"""What can be said before training: ranks from the geometry of hidden states (GeLoRA)."""

from rankfold.plan.dimension import two_nn
from rankfold.plan.gelora import GeloraPlan, assign_ranks, gelora_plan, gelora_ranks
from rankfold.plan.states import Dimensions, intrinsic_dimensions

__all__ = [
    "Dimensions",
    "GeloraPlan",
    "assign_ranks",
    "gelora_plan",
    "gelora_ranks",
    "intrinsic_dimensions",
    "two_nn",
]
