"""Any adapter of ours, folded into a plain LoRA that engines load, with its proof beside it.

from rankfold.fold import fold_adapter
print(fold_adapter("runs/movie/adapter", "runs/movie/folded").summary())
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankfold.factors import Factors
from rankfold.fold import uniform
from rankfold.fold.probe import probe as run_probe
from rankfold.fold.proof import FoldReport, prove, serve_flags, sha256
from rankfold.fold.source import Source, from_folder, from_model
from rankfold.folders import whole_folder

__all__ = ["FoldReport", "fold_adapter", "fold_model"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fold_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    pad: str = "serve",
    probe: bool = True,
    force: bool = False,
) -> FoldReport:
    """Folds an adapter folder into a LoRA folder (profile `uniform`, shared/field.md §3.3).

    Args:
        adapter: what `save_pretrained` or `rankfold train` wrote.
        out: the folder to make; it appears whole or not at all.
        base: the base model, if not the one the adapter names. Its config is needed; its weights only for the probe.
        dtype: "float32", "bfloat16" or "float16"; by default the base's.
        pad: "serve" pads the rank up to one that engines name in their flags, "none" does not.
        probe: compare logits with stock PEFT, where the base's weights can be loaded.
        force: replace an existing `out`.

    Raises:
        FileExistsError: `out` exists and `force` is not given.
        ValueError, TypeError: the adapter is damaged, foreign, or has no fold; nothing is written.
    """
    adapter, out = Path(adapter), Path(out)
    with whole_folder(out, force) as folder:
        source = from_folder(adapter, base)
        report = _write(source, folder, out, str(adapter), dtype, pad, base)
        if probe:
            report.probe = run_probe(adapter, folder, source.config, base)
        _write_report(report, folder)
    return report


def fold_model(
    model: nn.Module,
    out: str | Path,
    *,
    adapter_name: str = "default",
    dtype: str | None = None,
    pad: str = "serve",
    force: bool = False,
) -> FoldReport:
    """Folds an adapter of a live model; arguments, result and errors as `fold_adapter`. The model is not changed."""
    out = Path(out)
    with whole_folder(out, force) as folder:
        source = from_model(model, adapter_name)
        report = _write(source, folder, out, f"adapter {adapter_name!r} of a live model", dtype, pad, None)
        _write_report(report, folder)
    return report


def _write(
    source: Source, folder: Path, out: Path, origin: str, dtype: str | None, pad: str, base: str | None
) -> FoldReport:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    to = source.dtype if dtype is None else DTYPES[dtype]
    if to not in DTYPES.values():
        to = torch.float32  # a quantised base: its integers are no dtype for factors
    needed = max((f.rank for n in source.layers if (f := source.factors(n)) is not None), default=0)
    rank = uniform.serve_rank(needed, pad)

    tensors: dict[str, Tensor] = {}
    for name, a, b in uniform.pairs(source, rank, to):
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    parameters = sum(t.numel() for t in tensors.values())
    tensors |= {k: v.detach().to("cpu", to).contiguous() for k, v in source.heads.items()}
    weights = folder / "adapter_model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    config = uniform.config(source, rank)
    config["base_model_name_or_path"] = base or config["base_model_name_or_path"]
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    written = load_file(weights)  # the proof is about what is on the disk
    layers = []
    for name in source.layers:
        trained = source.factors(name)
        assert trained is not None
        key = f"base_model.model.{name}.lora_"
        on_disk = Factors(written[key + "A.weight"].double(), written[key + "B.weight"].double())
        layers.append(prove(name, trained, trained.pad(rank), on_disk))
    return FoldReport(
        adapter=origin,
        method=source.config.method,
        base=str(config["base_model_name_or_path"]) if config["base_model_name_or_path"] else None,
        rank=rank,
        needed_rank=needed,
        dtype=str(to).removeprefix("torch."),
        parameters=parameters,
        bytes=weights.stat().st_size,
        layers=layers,
        probe={"skipped": "not asked for"},
        serve=serve_flags(rank, uniform.serve_rank(rank), out),
        notes=_notes(source, rank),
        sha256={f: sha256(folder / f) for f in ("adapter_config.json", "adapter_model.safetensors")},
    )


def _notes(source: Source, rank: int) -> list[str]:
    notes = []
    if rank > uniform.SERVE_RANKS[-1]:
        notes.append(f"rank {rank} exceeds 512, the largest that vLLM takes; train with a smaller r or shared_rank")
    zeros = len(source.sites) - len(source.layers)
    if zeros:
        notes.append(f"{zeros} modules of adapted types have no adapter and were written as zeros (TGI wants them)")
    schedule = source.config.schedule or {}
    if schedule and not schedule.get("finished"):
        notes.append(f"the schedule had not finished: step {schedule['step']} of {schedule['total_steps']}")
    if source.heads:
        notes.append("the trained head is kept in modules_to_save; only PEFT and vLLM's classifiers read it")
    return notes


def _write_report(report: FoldReport, folder: Path) -> None:
    (folder / "fold_report.json").write_text(report.to_json(), encoding="utf-8")
    card = f"---\nlibrary_name: peft\nbase_model: {report.base}\ntags: [lora, rankfold]\n---\n\n"
    card += f"# A plain LoRA, folded from {report.method}\n\n```\n{report.summary()}\n```\n\n"
    card += "Made by `rankfold fold`; the errors per layer are in `fold_report.json`.\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
