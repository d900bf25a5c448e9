"""Optimisers that know what a pair is: LoRA's two factors are stepped together, for rankfold's adapters and for PEFT's."""

from rankfold.optim.lora_fa import LoraFa
from rankfold.optim.lora_plus import LoraPlus
from rankfold.optim.lora_pro import LoraPro
from rankfold.optim.lora_rite import LoraRite
from rankfold.optim.pairs import describe, pairs
from rankfold.optim.riemannian import Riemannian

__all__ = [
    "LoraFa",
    "LoraPlus",
    "LoraPro",
    "LoraRite",
    "Riemannian",
    "describe",
    "pairs",
]
