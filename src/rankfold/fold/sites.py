"""The sites of a fold beside those that have the adapter, and what PEFT makes of some of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from rankfold.host.adapter import Site, module_type
from rankfold.host.peft_api import names_of_experts
from rankfold.io.weight_names import to_model

#: What is refused of PEFT's LoRA on convolutions.
GROUPED = (
    "a convolution with groups, dilation or padding other than zeros, of which PEFT's LoRA computes no update of its weight, so "
    "that it has no fold; leave it out of target_modules, or train it with a method of rankfold"
)


def of_adapted_types(sites: list[Site], adapted: list[str]) -> list[Site]:
    """Those of `sites` whose module type and shape has the adapter somewhere: TGI wants every layer of a type."""
    names = set(adapted)
    types = {_type(s) for s in sites if s.name in names}
    return [s for s in sites if _type(s) in types]


#: What SGLang asks for beside a module, because it stacks them (sglang #25913): a missing one is a KeyError.
SIBLINGS = {"q_proj": ["v_proj"], "k_proj": ["q_proj", "v_proj"], "v_proj": ["q_proj"], "up_proj": ["gate_proj"]}


def siblings(sites: list[Site], adapted: list[str]) -> list[Site]:
    """Sites without an adapter that SGLang wants beside those of `of_adapted_types`."""
    known, found = {s.name: s for s in sites}, {s.name for s in of_adapted_types(sites, adapted)}
    wanted: dict[str, Site] = {}
    for name in sorted(found):
        block, _, kind = name.rpartition(".")
        for other in (f"{block}.{n}" for n in SIBLINGS.get(kind, [])):
            if other in known and other not in found:
                wanted[other] = known[other]
    return list(wanted.values())


def unfit(sites: list[Site], modules: list[str]) -> set[str]:
    """The engines that want more than these sites: another module that they stack with one of them (SGLang), or every layer of a
    type (TGI).

    Args:
        modules: of the base, as far as they are known.
    """
    names = {site.name for site in sites}
    blocks = [name.rpartition(".") for name in names]
    alone = any(f"{block}.{other}" not in names for block, _, kind in blocks for other in SIBLINGS.get(kind, []))
    have, every = _layers(names), _layers([*names, *modules])
    partial = any(every[kind] - found for kind, found in have.items())
    return {engine for engine, refuses in (("SGLang", alone), ("TGI", partial)) if refuses}


def _layers(names: Iterable[str]) -> dict[str, set[int]]:
    """By type of module, the layers that have one: the first number in a name."""
    found: dict[str, set[int]] = {}
    for name in names:
        numbers = [int(part) for part in name.split(".") if part.isdecimal()]
        found.setdefault(module_type(name), set()).update(numbers[:1])
    return found


def _type(site: Site) -> tuple[str, int, int]:
    return module_type(site.name), site.out_features, site.in_features


def modules_of_experts(base: nn.Module, modules: list[str]) -> dict[str, list[str]]:
    """See `Source.experts`. The block around the experts may have had another name as well (Mixtral's)."""
    once: dict[str, list[str]] = {}
    for name, parameter in names_of_experts(base).items():
        once.setdefault(parameter, []).append(name)
    to_new, found = to_model(base, prefix=False), {}
    for module in modules:
        block, _, own = module.rpartition(".")
        for place in (module, f"{block.rpartition('.')[0]}.block_sparse_moe.{own}"):
            for parameter, names in once.items():
                if to_new(f"{place}.0.{names[0]}.weight") == (f"{module}.{parameter}", True):
                    found[f"{module}.{parameter}"] = [f"{place}.{{}}.{name}" for name in names]
    return found


def unlike_peft(base: Any) -> bool:
    """Whether it is a convolution whose LoRA in PEFT (layer.py, _ConvNd) differs: it leaves dilation and padding_mode out, and reads
    all channels for each group."""
    return isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d) and (
        base.groups > 1 or any(d != 1 for d in base.dilation) or base.padding_mode != "zeros"
    )
