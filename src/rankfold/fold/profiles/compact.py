"""Profile `compact`: every module keeps its own rank, in `rank_pattern`.

Its readers scale a module by lora_alpha / (its rank): PEFT, vLLM from 0.32 on and llama.cpp's converter. B is stored times rank/α, so that this comes out as 1. An `alpha_pattern` would be misread by some; none is written.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from rankfold.fold.lora_tensors import Layout
from rankfold.fold.profiles.profile import Folded, Profile, Written
from rankfold.fold.profiles.uniform import config, loaders, reader, serve_flags, serve_rank, write_config
from rankfold.host.peft_api import exact_pattern
from rankfold.kernel.factors import Factors

#: The one lora_alpha. Any number would do: B makes up for it. It does not depend on the ranks, so that a module can be
#: rounded before those of the others are known.
ALPHA = 16


def rounded(exact: Factors, dtype: torch.dtype) -> Factors:
    """The same update with rank/α multiplied into B and α/rank left to the reader."""
    rank = max(exact.rank, 1)
    return replace(exact, up=exact.up * (rank / ALPHA), scale=ALPHA / rank).to(dtype)


def write(folded: Folded, folder: Path) -> Written:
    """adapter_config.json and adapter_model.safetensors; a module without components gets one of zeros, because PEFT
    has no rank 0 and a missing layer would need a longer list of targets."""
    source, largest = folded.source, max(folded.rank, 1)
    ranks = {name: max(factors.rank, 1) for name, factors in folded.factors.items()}
    tensors = Layout(source.sites).tensors({name: f.pad(ranks[name]) for name, f in folded.factors.items()})
    parameters = sum(t.numel() for t in tensors.values())
    tensors |= folded.heads
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    written = {
        **config(source, largest),
        "base_model_name_or_path": folded.base,
        "lora_alpha": ALPHA,
        "rank_pattern": {exact_pattern(name): rank for name, rank in ranks.items() if rank != largest},
    }
    write_config(written, source, folder)
    flags = serve_flags(largest, serve_rank(largest), folded.out)
    return Written(
        rank=largest,
        parameters=parameters,
        read=reader(folder, source, {name: ALPHA / rank for name, rank in ranks.items()}),
        serve=loaders(source, {"vLLM ≥ 0.32": flags["vLLM"], "PEFT": flags["PEFT"]}),
        notes=[
            "where ranks differ by module, SGLang 0.5.23 refuses an adapter, and TGI, LoRAX, LMDeploy and vLLM before 0.32 scale it "
            "wrongly or refuse it; fold with --profile uniform for them"
        ],
    )


PROFILE = Profile(write, rounded, noun="a plain LoRA with a rank for each module", loads_as="adapter")
