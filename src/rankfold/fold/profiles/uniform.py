"""Profile `uniform`: one rank, lora_alpha = r, everything baked in. It meets every engine's rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shlex import quote

import torch
from safetensors.torch import load_file, save_file

from rankfold.errors import RankfoldError
from rankfold.fold.lora_tensors import Layout
from rankfold.fold.profiles.profile import Folded, Profile, Written
from rankfold.fold.sites import unfit
from rankfold.fold.source import Source
from rankfold.host.kinds import kind_named
from rankfold.io.adapters import write_labels
from rankfold.io.files import to_json
from rankfold.kernel.factors import Factors

#: vLLM's legal values of max_lora_rank from 8 on: padding to one of them costs nothing at serving time.
SERVE_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def serve_rank(rank: int, pad: str = "serve") -> int:
    """The rank that every module gets.

    Args:
        rank: the largest rank of any module.
        pad: "serve" rounds up to a rank that engines name in their flags; "none" keeps it.
    """
    if pad not in ("serve", "none"):
        raise RankfoldError(f'pad={pad!r} must be "serve" or "none"')
    rank = max(rank, 1)
    return next((r for r in SERVE_RANKS if r >= rank), rank) if pad == "serve" else rank


def write(folded: Folded, folder: Path) -> Written:
    """adapter_config.json and adapter_model.safetensors, every module zero-padded to one rank."""
    rank = serve_rank(folded.rank, folded.pad)
    source = replace(folded.source, sites=[*folded.source.sites, *folded.source.siblings])
    zeros = {
        s.name: Factors(
            torch.zeros(0, s.in_features, dtype=folded.dtype), torch.zeros(s.out_features, 0, dtype=folded.dtype)
        )
        for s in folded.source.siblings
    }
    padded = {name: factors.pad(rank) for name, factors in {**folded.factors, **zeros}.items()}
    tensors = Layout(source.sites).tensors(padded)
    parameters = sum(t.numel() for t in tensors.values())
    tensors |= folded.heads
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    written = {**config(source, rank), "base_model_name_or_path": folded.base}
    write_config(written, source, folder)
    return Written(
        rank=rank,
        parameters=parameters,
        read=reader(folder, source, {}),
        serve=loaders(source, serve_flags(rank, serve_rank(rank), folded.out)),
        notes=_notes(source, rank),
    )


def write_config(written: dict[str, object], source: Source, folder: Path) -> None:
    """adapter_config.json, and beside a classifier's head the names of its classes, so that the fold can be merged later."""
    (folder / "adapter_config.json").write_text(to_json(written), encoding="utf-8")
    if source.heads and source.classes.problem in (None, "single_label_classification"):
        write_labels(source.classes.names, folder)


def loaders(source: Source, flags: dict[str, str]) -> dict[str, str]:
    """Those that load the fold: a convolution's or an embedding's LoRA is for PEFT; a trained head too, and for vLLM where it is a
    classifier's. Zeros for what SGLang and TGI want beside it need the base's shapes."""
    if not all(kind_named(site.kind).linear for site in source.sites):
        return {"PEFT": flags["PEFT"]}
    if not source.heads:
        lacking = unfit(source.sites, source.modules)
        return {engine: flag for engine, flag in flags.items() if engine not in lacking}
    classifier = set(getattr(source.config, "modules_to_save", None) or []) <= {"classifier", "score"}
    return {engine: f for engine, f in flags.items() if engine == "PEFT" or (classifier and engine.startswith("vLLM"))}


def reader(folder: Path, source: Source, scales: dict[str, float]) -> Callable[[str], Factors]:
    """Reads a module's factors back from a folder in PEFT's layout; `scales` holds α/r where it is not 1."""
    tensors, layout = load_file(folder / "adapter_model.safetensors"), Layout(source.sites)
    return lambda name: layout.factors(name, tensors, scales.get(name, 1.0))


def _notes(source: Source, rank: int) -> list[str]:
    notes = []
    if rank > SERVE_RANKS[-1]:
        notes.append(f"rank {rank} exceeds 512, the largest that vLLM takes; compress it with --rank 512 or less")
    zeros = len(source.sites) - len(source.adapted)
    if zeros:
        notes.append(
            f"{zeros} modules of adapted types, or stacked with them, have no adapter and were written as zeros (TGI and SGLang want them)"
        )
    if source.heads:
        notes.append("the trained head is kept in modules_to_save; only PEFT reads it, and vLLM a classifier or score")
    return notes


def serve_flags(rank: int, largest: int, out: Path) -> dict[str, str]:
    """The flags with which each engine loads the fold; vLLM takes only certain values, `largest` is one."""
    named = quote(f"fold={out}")
    return {
        "vLLM": f"vllm serve BASE --enable-lora --max-lora-rank {largest} --lora-modules {named}",
        "SGLang": f"python -m sglang.launch_server --model-path BASE --max-lora-rank {rank} --lora-paths {named}",
        "TGI": f"text-generation-launcher --model-id BASE --lora-adapters {named}",
        "PEFT": f"PeftModel.from_pretrained(base, {str(out)!r})",
    }


def config(source: Source, rank: int) -> dict[str, object]:
    """adapter_config.json: only keys that PEFT has had for years, so that older readers do not choke."""
    task, layout = source.config.task_type, Layout(source.sites)
    parameters = layout.parameters()
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": source.config.base_model_name_or_path,
        "revision": source.config.revision,
        "task_type": getattr(task, "value", task),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": target_suffixes([n for n in layout.stacks if n not in parameters], source.modules),
        **({"target_parameters": target_suffixes(parameters, source.parameters)} if parameters else {}),
        **({"ensure_weight_tying": True} if getattr(source.config, "ensure_weight_tying", False) else {}),
        "modules_to_save": sorted(getattr(source.config, "modules_to_save", None) or []) or None
        if source.heads
        else None,
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
    wanted = set(targets)
    others = {suffix for module in modules if module not in wanted for suffix in _suffixes(module)}
    return sorted({next((s for s in _suffixes(name) if s not in others), name) for name in targets})


def _suffixes(name: str) -> list[str]:
    """Shortest first: of "h.0.out", "out", "0.out" and "h.0.out"."""
    parts = name.split(".")
    return [".".join(parts[-k:]) for k in range(1, len(parts) + 1)]


PROFILE = Profile(write, loads_as="adapter")
