"""Predicts an adapter's fold before the adapter exists, with fold's own sources on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from rankfold.fold import native as ours
from rankfold.fold import peft_adapters
from rankfold.fold.lora_tensors import check_kinds
from rankfold.fold.profiles.uniform import SERVE_RANKS, serve_rank
from rankfold.fold.source import Source
from rankfold.host.config import LowRankConfig
from rankfold.plan.layers import adapted_layers, alike


@dataclass(frozen=True)
class Fold:
    """A plain LoRA of profile `uniform`.

    Args:
        rank: the largest any module needs, with every component alive.
        served: the rank it is padded to, which engines name in their flags.
        parameters: of its matrices; padding, and zeros that engines want beside them, included.
    """

    rank: int
    served: int
    parameters: int

    @property
    def flag(self) -> str:
        """What vLLM must be told; it takes no larger rank than 512."""
        return f"--max-lora-rank {self.served}" if self.served <= SERVE_RANKS[-1] else "too large for vLLM"


def forecast(model: PeftModel) -> Fold | str:
    """The fold of an adapter on a meta model, or a sentence that says why it cannot be folded."""
    config, training = model.peft_config["default"], model.training
    model.eval()  # VB-LoRA asks for values while it trains
    try:
        with torch.device("meta"):
            source: Source = (
                ours.from_model(model, heads={})
                if isinstance(config, LowRankConfig)
                else peft_adapters.from_model(model)
            )
            check_kinds(source, "uniform")
            layers = adapted_layers(model.get_base_model())
            rank = 0
            for names in alike(layers):
                module = names[0].replace(".base_layer", "")
                for name in [n for n in source.adapted if n == module or n.startswith(f"{module}.")]:
                    update = source.update(name)
                    if isinstance(update, Tensor):
                        return "its update is dense: `rankfold fold --rank N` or `--error E` comes near it"
                    rank = max(rank, min(update.rank, *update.shape))
    except (ValueError, TypeError) as error:
        return str(error)
    finally:
        model.train(training)
    served, sites = serve_rank(rank), [*source.sites, *source.siblings]
    return Fold(rank, served, served * sum(site.in_features + site.out_features for site in sites))
