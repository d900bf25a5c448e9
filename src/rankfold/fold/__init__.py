"""Any adapter of ours, folded into a plain LoRA that engines load, with its proof beside it.

from rankfold.fold import fold_adapter
print(fold_adapter("runs/movie/adapter", "runs/movie/folded").summary())
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from rankfold.config import LowRankConfig
from rankfold.factors import Factors
from rankfold.fold import compact, gguf, merged, mlx, ours, uniform
from rankfold.fold.probe import probe as run_probe
from rankfold.fold.profile import Folded, Profile
from rankfold.fold.proof import FoldReport, LayerProof, prove, sha256
from rankfold.fold.source import Source, Update, read_config
from rankfold.folders import whole_folder

__all__ = ["PROFILES", "FoldReport", "fold_adapter", "fold_model"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROFILES: dict[str, Profile] = {
    "uniform": uniform.PROFILE,
    "compact": compact.PROFILE,
    "gguf": gguf.PROFILE,
    "mlx": mlx.PROFILE,
    "merged": merged.PROFILE,
}


def fold_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    profile: str = "uniform",
    dtype: str | None = None,
    pad: str = "serve",
    probe: bool = True,
    force: bool = False,
) -> FoldReport:
    """Folds an adapter folder into a plain LoRA.

    Args:
        adapter: what `save_pretrained` or `rankfold train` wrote.
        out: the folder to make; it appears whole or not at all.
        base: the base model, if not the one the adapter names. Its config is needed; its weights only for the probe.
        profile: one of `PROFILES`: the format, see docs/folding.md.
        dtype: "float32", "bfloat16" or "float16"; by default the base's.
        pad: of profile uniform: "serve" pads the rank up to one that engines name in their flags, "none" does not.
        probe: compare logits with stock PEFT, where the base's weights can be loaded.
        force: replace an existing `out`.

    Raises:
        FileExistsError: `out` exists and `force` is not given.
        ValueError, TypeError: the adapter is damaged, foreign, or has no fold; nothing is written.
    """
    adapter, out = Path(adapter), Path(out)
    with whole_folder(out, force) as folder:
        source = _source(adapter, base)
        report = _write(source, folder, out, str(adapter), profile, dtype, pad, base)
        if probe:
            report.probe = run_probe(adapter, folder, source.config, base, PROFILES[profile])
        _write_report(report, folder)
    return report


def fold_model(
    model: nn.Module,
    out: str | Path,
    *,
    adapter_name: str = "default",
    profile: str = "uniform",
    dtype: str | None = None,
    pad: str = "serve",
    force: bool = False,
) -> FoldReport:
    """Folds an adapter of a live model; arguments, result and errors as `fold_adapter`. The model is not changed."""
    out = Path(out)
    with whole_folder(out, force) as folder:
        source = ours.from_model(model, adapter_name)
        report = _write(source, folder, out, f"adapter {adapter_name!r} of a live model", profile, dtype, pad, None)
        _write_report(report, folder)
    return report


def _source(adapter: Path, base: str | None) -> Source:
    config = read_config(adapter)
    if isinstance(config, LowRankConfig):
        return ours.from_folder(adapter, config, base)
    kind = getattr(config.peft_type, "value", config.peft_type)
    raise TypeError(f"peft_type={kind} is not one of rankfold's methods; this version folds its own adapters only")


def _write(
    source: Source, folder: Path, out: Path, origin: str, profile: str, dtype: str | None, pad: str, base: str | None
) -> FoldReport:
    if profile not in PROFILES:
        raise ValueError(f"profile={profile!r} must be one of {', '.join(PROFILES)}")
    chosen = PROFILES[profile]
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    to = source.dtype if dtype is None else DTYPES[dtype]
    if to not in DTYPES.values():
        to = torch.float32  # a quantised base: its integers are no dtype for factors

    adapted = set(source.adapted)
    rounded: dict[str, Factors] = {}
    layers = []
    for site in source.sites:
        if site.name in adapted:
            trained = source.update(site.name)
            exact = _factors(trained)
            rounded[site.name] = chosen.rounded(exact, to)
            layers.append(prove(site.name, trained, exact, rounded[site.name].to(dtype=torch.float64)))
        else:
            zero = Factors(torch.zeros(0, site.in_features), torch.zeros(site.out_features, 0))
            rounded[site.name] = chosen.rounded(zero, to)

    base = base or source.config.base_model_name_or_path
    folded = Folded(source, rounded, to, base, out, pad)
    written = chosen.write(folded, folder)
    layers = [_on_disk(proof, rounded[proof.module], written.read(proof.module)) for proof in layers]
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return FoldReport(
        adapter=origin,
        method=source.method,
        profile=profile,
        base=base,
        rank=written.rank,
        needed_rank=folded.rank,
        dtype=str(to).removeprefix("torch."),
        parameters=written.parameters,
        bytes=sum(f.stat().st_size for f in files),
        layers=layers,
        probe={"skipped": "not asked for"},
        serve=written.serve,
        notes=[*source.notes, *written.notes],
        sha256={str(f.relative_to(folder)): sha256(f) for f in files},
        noun=chosen.noun,
    )


def _factors(update: Update) -> Factors:
    """Balanced, and without the components that add nothing."""
    assert isinstance(update, Factors)
    balanced = update.balanced()
    return balanced.select(balanced.up.norm(dim=0) > 0)


def _on_disk(proof: LayerProof, rounded: Factors, read: Update) -> LayerProof:
    """The proof, about what is on the disk; raises OSError where that is not what was written."""
    if not isinstance(read, Factors):
        added = prove(proof.module, rounded.to(torch.float64), rounded.to(torch.float64), read)
        return replace(proof, frobenius=added.frobenius, max=added.max)
    rank = rounded.rank
    same = torch.equal(read.down[:rank], rounded.down) and torch.equal(read.up[:, :rank], rounded.up)
    if not same or read.scale != rounded.scale or read.down[rank:].any() or read.up[:, rank:].any():
        raise OSError(
            f"{proof.module}: what was read back from the disk is not what was written; the disk may be full or broken"
        )
    return proof


def _write_report(report: FoldReport, folder: Path) -> None:
    (folder / "fold_report.json").write_text(report.to_json(), encoding="utf-8")
    library = PROFILES[report.profile].library
    card = f"---\nlibrary_name: {library}\nbase_model: {report.base}\ntags: [lora, rankfold]\n---\n\n"
    card += (
        f"# {report.noun[0].upper()}{report.noun[1:]}, folded from {report.method}\n\n```\n{report.summary()}\n```\n\n"
    )
    card += "Made by `rankfold fold`; the errors per layer are in `fold_report.json`.\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
