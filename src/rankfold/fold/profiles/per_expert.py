"""Profile `per_expert`: one LoRA for each expert, under the names that experts had as modules.

vLLM reads fused LoRAs for the classes alone that it declares as three-dimensional (is_3d_moe_weight: gpt-oss, Qwen3.5-MoE …). For the
others (Mixtral, Qwen3-MoE, OLMoE, DeepSeek) it wants `experts.<e>.gate_proj`, `up_proj` and `down_proj` of every expert, and would
take the rows of a fused gate_up_proj for interleaved. PEFT loads such a file too, through its own conversion.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankfold.errors import RankfoldError
from rankfold.fold.lora_tensors import Layout, parameter_of
from rankfold.fold.profiles.profile import Folded, Profile, Written
from rankfold.fold.profiles.uniform import config, loaders, serve_flags, serve_rank, write_config
from rankfold.fold.source import Source
from rankfold.host.adapter import Site
from rankfold.kernel.factors import Factors


def write(folded: Folded, folder: Path) -> Written:
    """adapter_config.json and adapter_model.safetensors, every module and expert zero-padded to one rank."""
    source = folded.source
    _check(source)
    rank = serve_rank(folded.rank, folded.pad)
    others = [site for site in source.sites if site.kind != "experts"]
    padded = {name: factors.pad(rank) for name, factors in folded.factors.items()}
    tensors = Layout(others).tensors(padded)
    for site in source.sites:
        for module, up in _split(source, site, padded[site.name].up):
            tensors[f"{module}.lora_A.weight"] = padded[site.name].down.clone()
            tensors[f"{module}.lora_B.weight"] = up
    parameters = sum(t.numel() for t in tensors.values())
    tensors |= folded.heads
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    experts = sorted({names.rpartition(".")[2] for found in source.experts.values() for names in found})
    written: dict[str, Any] = config(replace(source, sites=others), rank)
    written |= {"base_model_name_or_path": folded.base, "target_modules": [*written["target_modules"], *experts]}
    write_config(written, source, folder)
    stored = load_file(folder / "adapter_model.safetensors")
    sites, layout = {site.name: site for site in source.sites}, Layout(others)

    def read(name: str) -> Factors:
        if sites[name].kind != "experts":
            return layout.factors(name, stored)
        modules = [module for module, _ in _split(source, sites[name], torch.empty(2, 0))]
        ups = [stored[f"{module}.lora_B.weight"] for module in modules]
        return Factors(stored[f"{modules[0]}.lora_A.weight"], torch.cat(ups))

    flags = serve_flags(rank, serve_rank(rank), folded.out)
    known = loaders(replace(source, sites=others), {engine: flags[engine] for engine in ("vLLM", "PEFT")})
    return Written(rank, parameters, read, known)


def _split(source: Source, site: Site, up: Tensor) -> list[tuple[str, Tensor]]:
    """The modules that one expert's matrix once was, and their rows of `up`; none where the site is not an expert."""
    if site.kind != "experts":
        return []
    names = source.experts[parameter_of(site)]
    index = site.name.rsplit(".", 2)[1]
    rows = up.chunk(len(names))
    return [
        (f"base_model.model.{name.format(index)}", part.contiguous()) for name, part in zip(names, rows, strict=True)
    ]


def _check(source: Source) -> None:
    adapted = {parameter_of(site) for site in source.sites if site.kind == "experts"}
    if unknown := sorted(adapted - source.experts.keys()):
        raise RankfoldError(
            f"profile per_expert: the names that the experts of {unknown[0]} had as modules are not known; fold with profile uniform"
        )
    lacking = sorted(source.experts.keys() - adapted)
    if adapted and lacking:
        raise RankfoldError(
            f"profile per_expert: vLLM wants all matrices of every expert, and {lacking[0]} has no adapter; fold with profile uniform"
        )


PROFILE = Profile(write, noun="a plain LoRA for each expert", loads_as="adapter")
