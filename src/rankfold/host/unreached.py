"""What of a model has no adapter, by the kind of weight and with its share of the parameters: `all-linear` is not all.

print(in_words(unreached(model)))      # no adapter on: fused experts, 91.2 % of the parameters (model.layers.0.mlp...)
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from rankfold.host.adapter import SharedState
from rankfold.host.peft_api import names_of_experts

EXPERTS = "fused experts"
_KINDS: tuple[tuple[str, tuple[type[nn.Module], ...]], ...] = (
    ("embeddings", (nn.Embedding, nn.EmbeddingBag)),
    ("convolutions", (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)),
)
logger = logging.getLogger("rankfold")


@dataclass(frozen=True)
class Unreached:
    """Weights of one kind without an adapter.

    Args:
        names: of the parameters, those they are tied with among them.
        parameters: tied ones count once.
        share: of all of the base's parameters.
    """

    kind: str
    names: tuple[str, ...]
    parameters: int
    share: float


def unreached(model: nn.Module) -> list[Unreached]:
    """The fused experts, embeddings and convolutions that neither an adapter nor `modules_to_save` reaches, and the linear layers whose
    name means fused experts instead; the largest first.

    Args:
        model: with adapters, ours or PEFT's.
    """
    reached, added = _touched(model)
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name.removeprefix("base_model.model."))
    found: dict[str, dict[int, nn.Parameter]] = {}
    for module in model.modules():
        for kind, p in _of_a_kind(module):
            if id(p) not in reached and id(p) not in added:
                found.setdefault(kind, {})[id(p)] = p
    lent = names_of_experts(model).keys() - {"gate"}
    if lent and EXPERTS not in found:  # names that mean the experts now
        for name, module in model.named_modules():
            if (
                isinstance(module, nn.Linear)
                and name.rpartition(".")[2] in lent
                and id(module.weight) not in reached | added
            ):
                found.setdefault("linear layers called as experts were", {})[id(module.weight)] = module.get_parameter(
                    "weight"
                )
    total = sum(p.numel() for p in model.parameters() if id(p) not in added)
    sums = {kind: sum(p.numel() for p in held.values()) for kind, held in found.items()}
    return [
        Unreached(kind, tuple(n for i in found[kind] for n in names[i]), sums[kind], sums[kind] / total)
        for kind in sorted(found, key=lambda kind: -sums[kind])
    ]


def in_words(found: Sequence[Unreached]) -> str:
    """One sentence; "" where nothing is left."""
    parts = [
        f"{one.kind}, {100 * one.share:.3g} % of the parameters ({one.names[0]}"
        f"{f' and {len(one.names) - 1} more' if len(one.names) > 1 else ''})"
        for one in found
    ]
    return f"no adapter on: {'; '.join(parts)}" if parts else ""


def say(model: nn.Module, targets: object) -> None:
    """Tells whoever asked for all linear layers what that leaves: experts, which once were linear layers, by a warning, and
    the rest once in the log. A list of names reaches what it names, but for experts. Of a model without values, which is only
    counted, a plan says it.

    Args:
        targets: `target_modules` as the user gave it.
    """
    if any(p.is_meta for p in model.parameters()):
        return
    found = unreached(model)
    experts = any(one.kind == EXPERTS for one in found)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        if experts:
            warnings.warn(f"target_modules='all-linear': {in_words(found)}", stacklevel=2)
        elif found:
            _log_once(f"target_modules='all-linear': {in_words(found)}")
    elif experts:
        _log_once(in_words([one for one in found if one.kind == EXPERTS]))


@cache
def _log_once(sentence: str) -> None:
    logger.warning(sentence)


def _touched(model: nn.Module) -> tuple[set[int], set[int]]:
    """Ids of the base's parameters that are adapted or trained in full, and of those that adapters added."""
    reached, added = set(), set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            own = {id(p) for p in base.parameters()}
            added |= {id(p) for p in module.parameters()} - own
            one = getattr(module, "parameter_name", None)  # PEFT's adapters of a single parameter
            reached |= {id(getattr(base, one))} if one else own
        elif isinstance(module, AuxiliaryTrainingWrapper):
            reached |= {id(p) for p in module.parameters()}
        elif isinstance(module, SharedState):
            added |= {id(p) for p in module.parameters()}
    return reached, added


def _of_a_kind(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for kind, classes in _KINDS:
        if isinstance(module, classes):
            yield from ((kind, p) for p in module.parameters(recurse=False))
    yield from ((EXPERTS, p) for _, p in fused_experts(module))


def fused_experts(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter of the weights of many experts in one tensor, experts first: what transformers 5 makes of a mixture of
    experts."""
    count = getattr(module, "num_experts", None)
    own = module.named_parameters(recurse=False)
    return [(name, p) for name, p in own if p.ndim == 3 and p.shape[0] == count]
