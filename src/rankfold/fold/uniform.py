"""Profile `uniform`: one rank, lora_alpha = r, everything baked in. It meets every engine's rules (shared/field.md §3.3)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rankfold.factors import Factors
from rankfold.fold.source import Source

#: vLLM's legal values of max_lora_rank from 8 on: padding to one of them costs nothing at serving time.
SERVE_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def serve_rank(rank: int, pad: str = "serve") -> int:
    """The rank that every module gets.

    Args:
        rank: the largest rank of any module.
        pad: "serve" rounds up to a rank that engines name in their flags; "none" keeps it.
    """
    if pad not in ("serve", "none"):
        raise ValueError(f'pad={pad!r} must be "serve" or "none"')
    rank = max(rank, 1)
    return next((r for r in SERVE_RANKS if r >= rank), rank) if pad == "serve" else rank


def pairs(source: Source, rank: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(module, lora_A rank × in, lora_B out × rank), balanced and zero-padded; zeros where a module has no adapter."""
    for site in source.sites:
        trained = source.factors(site.name)
        if trained is None:
            trained = Factors(torch.zeros(0, site.in_features), torch.zeros(site.out_features, 0))
        padded = trained.pad(rank)
        yield site.name, padded.down.to(dtype).contiguous(), padded.up.to(dtype).contiguous()


def config(source: Source, rank: int) -> dict[str, object]:
    """adapter_config.json: only keys that PEFT has had for years, so that older readers do not choke."""
    task = source.config.task_type
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": source.config.base_model_name_or_path,
        "revision": source.config.revision,
        "task_type": getattr(task, "value", task),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": target_suffixes([s.name for s in source.sites], source.modules),
        "modules_to_save": sorted(source.config.modules_to_save or []) or None if source.heads else None,
        "bias": "none",
        "lora_bias": False,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "fan_in_fan_out": source.transposed,
        "layers_to_transform": None,
        "layers_pattern": None,
        "layer_replication": None,
    }


def target_suffixes(targets: list[str], modules: list[str]) -> list[str]:
    """The shortest name suffixes that match all targets and no other module, sorted.

    >>> target_suffixes(["h.0.attn.out", "h.1.attn.out"], ["h.0.attn.out", "h.1.attn.out", "h.0.mlp.out", "h.1.mlp.out"])
    ['attn.out']
    """
    wanted, found = set(targets), set()
    for name in targets:
        parts = name.split(".")
        for k in range(1, len(parts) + 1):
            suffix = ".".join(parts[-k:])
            if k == len(parts) or all(m in wanted for m in modules if m == suffix or m.endswith("." + suffix)):
                found.add(suffix)
                break
    return sorted(found)
