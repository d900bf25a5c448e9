"""Profile `mlx`: adapters.safetensors and adapter_config.json as mlx-lm's `load_adapters` reads them.

    y = x Wᵀ + scale · (x lora_a) lora_b,      lora_a: in × r,  lora_b: r × out

Written from mlx-lm's source (`rankfold docs serving` says which version was run).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from shlex import quote

from safetensors.torch import load_file, save_file

from rankfold.errors import RankfoldError
from rankfold.fold.profiles.profile import Folded, Profile, Written
from rankfold.fold.source import base_config
from rankfold.io.files import to_json
from rankfold.kernel.factors import Factors

#: Model types whose modules mlx-lm names as transformers does. Older versions load adapters with strict=False, where a wrong
#: name is dropped without a word, so an unknown type is refused.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")

_BLOCK = re.compile(r"model\.layers\.\d+\.(.+)")


def write(folded: Folded, folder: Path) -> Written:
    """Both files; one rank, scale 1, every block of the model listed."""
    base, rank = base_config(folded.base, folded.source.config.revision), max(folded.rank, 1)
    if base.model_type not in MODEL_TYPES:
        raise RankfoldError(
            f"profile mlx: model_type={base.model_type!r} is not among {', '.join(MODEL_TYPES)}, whose names in mlx-lm are "
            "known to be the same; fold with --profile merged and convert the model with mlx_lm.convert"
        )
    if folded.source.heads:
        raise RankfoldError(
            "profile mlx: mlx-lm has no place for the trained head in modules_to_save; use --profile merged"
        )
    tensors, keys = {}, set()
    for name, factors in folded.factors.items():
        found = _BLOCK.fullmatch(name)
        if found is None:
            raise RankfoldError(f"profile mlx: {name} lies outside the model's blocks; use --profile merged")
        keys.add(found[1])
        padded = factors.pad(rank)
        tensors[f"{name}.lora_a"] = padded.down.T.contiguous()  # in × rank
        tensors[f"{name}.lora_b"] = padded.up.T.contiguous()  # rank × out
    save_file(tensors, folder / "adapters.safetensors", metadata={"format": "mlx"})
    written = {
        "fine_tune_type": "lora",
        "model": folded.base,
        "num_layers": base.num_hidden_layers,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    (folder / "adapter_config.json").write_text(to_json(written), encoding="utf-8")
    stored = load_file(folder / "adapters.safetensors")
    return Written(
        rank=rank,
        parameters=sum(t.numel() for t in tensors.values()),
        read=lambda name: Factors(stored[f"{name}.lora_a"].T, stored[f"{name}.lora_b"].T),
        serve={"mlx-lm": f"mlx_lm.generate --model BASE --adapter-path {quote(str(folded.out))}"},
        notes=_notes(folded.base),
    )


def _notes(base: str | None) -> list[str]:
    """mlx-lm reads theta at the top level alone, where transformers 5 no longer writes it."""
    try:
        config = json.loads((Path(str(base)) / "config.json").read_text(encoding="utf-8"))
        theta = config["rope_parameters"]["rope_theta"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if "rope_theta" in config or theta == 10000:
        return []
    return [f"mlx-lm takes theta 10000 for this base; write rope_theta: {theta} at the top level of its config.json"]


PROFILE = Profile(write, noun="an adapter for mlx-lm", library="mlx")
