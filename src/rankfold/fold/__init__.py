"""Any adapter of ours or of PEFT's, folded into a plain LoRA that engines load, with its proof beside it.

from rankfold.fold import fold_adapter
print(fold_adapter("runs/movie/adapter", "runs/movie/folded").summary())
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from peft import PeftConfig
from torch import Tensor, nn
from tqdm import tqdm

from rankfold.errors import RankfoldError
from rankfold.fold import native, peft_adapters
from rankfold.fold.approximate import Approximation
from rankfold.fold.approximate import approximate as approximate_in_place
from rankfold.fold.calibration import read_texts, second_moments, tokenise
from rankfold.fold.compression import CompressionLimit, compress
from rankfold.fold.in_memory import FoldedStateDict, fold_state_dict
from rankfold.fold.lora_tensors import check_kinds
from rankfold.fold.options import DTYPES, PROFILES, CheckedOptions, FoldOptions
from rankfold.fold.probe import probe as run_probe
from rankfold.fold.probe import trained_model
from rankfold.fold.profiles.profile import Folded
from rankfold.fold.proof import FoldReport, LayerProof, prove, prove_sum
from rankfold.fold.source import Source, Update, base_config, live_base
from rankfold.host.config import LowRankConfig
from rankfold.host.kinds import kind_named
from rankfold.io.adapters import read_classes
from rankfold.io.files import sha256, whole_folder
from rankfold.io.formats import SavedAdapter, read_adapter
from rankfold.kernel.factors import Factors

__all__ = [
    "PROFILES",
    "FoldOptions",
    "FoldReport",
    "FoldedStateDict",
    "fold_adapter",
    "fold_model",
    "fold_source",
    "fold_state_dict",
    "read_source",
]

REPORT, CARD = "fold_report.json", "README.md"


def fold_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    calibration: str | Path | None = None,
    approximate: str | None = None,
    probe: bool = True,
    **options: Unpack[FoldOptions],
) -> FoldReport:
    """Folds an adapter of rankfold's methods or of PEFT's into a plain LoRA.

    Args:
        adapter: what `save_pretrained` wrote, or the folder of a run of `rankfold train`; or a LoRA of mlx-lm, diffusers, kohya
            or llama.cpp, its folder or file.
        out: the folder to make; it appears whole or not at all.
        base: the base model, if not the one the adapter names. Its config is needed; its weights only for the probe.
        calibration: texts (a .jsonl with "text", or plain paragraphs) to run through the base with the adapter, so that
            compression keeps the outputs rather than the weights; `error` is then that of the outputs. With `approximate`, the texts
            on which its error is measured.
        approximate: of an adapter whose update depends on the input ("is" and "ms" of ResLoRA), the rule by which a LoRA comes near
            it; needs the base's weights.
        probe: compare logits with stock PEFT, where the base's weights can be loaded.
        options: as `CheckedOptions` says: profile, dtype, pad, rank, error, strict, force, progress.

    Raises:
        FileExistsError: `out` exists and `force` is not given, or it holds a file that was not written by a fold.
        FileNotFoundError: there is no `adapter`.
        ValueError: the adapter is damaged, foreign, or has no fold, or lies in `out`, or `strict` is exceeded;
            nothing is written.
    """
    asked = CheckedOptions(**options)
    read, out = read_adapter(adapter, base), Path(out)
    _check_out(out, read.path, base or read.config.base_model_name_or_path)
    with whole_folder(out, asked.force) as folder:
        limit, texts = _limit(asked), None if calibration is None else read_texts(calibration)
        near = None
        if approximate is None:
            source = source_of(read, base)
        else:
            source, near = _approximated(read, base, approximate, texts)
        known = replace(
            read, config=read.config if near else source.config
        )  # with the class of the base, where the folder does not say it
        if texts is not None and (limit or not near):
            limit = _weighed(limit, source, texts, lambda: trained_model(known, base))
        report = _write(source, folder, out, str(read.path), base, asked, limit)
        if probe:
            report.probe = run_probe(known, folder, base, PROFILES[asked.profile])
        report.approximation = near
        _write_report(report, folder)
    return report


def fold_model(
    model: nn.Module,
    out: str | Path,
    *,
    adapter_name: str = "default",
    calibration: str | Path | None = None,
    approximate: str | None = None,
    **options: Unpack[FoldOptions],
) -> FoldReport:
    """Folds an adapter of a live model; arguments, result and errors as `fold_adapter`. The model is not changed.

    `calibration` runs through the model as it is: with this adapter active, please.
    """
    asked, out = CheckedOptions(**options), Path(out)
    origin = f"adapter {adapter_name!r} of a live model"
    with whole_folder(out, asked.force) as folder:
        limit, texts = _limit(asked), None if calibration is None else read_texts(calibration)
        near, take_back = None, None
        config = getattr(model, "peft_config", {}).get(adapter_name)
        if approximate is not None:
            near, take_back = approximate_in_place(model, approximate, adapter_name, _batches(model, texts, config))
        foreign = not isinstance(config, LowRankConfig | None)
        try:
            source = (peft_adapters if foreign else native).from_model(model, adapter_name)
            _check_out(out, None, source.config.base_model_name_or_path)
            if texts is not None and (limit or not near):
                limit = _weighed(limit, source, texts, lambda: model)
            report = _write(source, folder, out, origin, None, asked, limit)
        finally:
            if take_back is not None:
                take_back()
        report.approximation = near
        _write_report(report, folder)
    return report


def read_source(adapter: str | Path, base: str | None = None) -> Source:
    """What `fold_adapter` reads an adapter folder as; arguments and errors as there."""
    return source_of(read_adapter(adapter, base), base)


def source_of(adapter: SavedAdapter, base: str | None = None) -> Source:
    """An adapter as the source of a fold; `base` and errors as in `fold_adapter`."""
    read = native.from_files if isinstance(adapter.config, LowRankConfig) else peft_adapters.from_files
    source = read(adapter, None if adapter.translated else base)  # a translated one names its base already
    source.notes.extend(adapter.notes)
    return source


def fold_source(
    source: Source,
    out: str | Path,
    *,
    origin: str,
    inputs: Sequence[str | Path] = (),
    base: str | None = None,
    **options: Unpack[FoldOptions],
) -> FoldReport:
    """Folds whatever offers updates by module; the other arguments, result and errors as `fold_adapter`.

    Args:
        origin: where it comes from, for the report.
        inputs: the folders that it was made from, which `force` must not delete.
    """
    asked, out = CheckedOptions(**options), Path(out)
    for one in inputs:
        _check_out(out, Path(one), base or source.config.base_model_name_or_path)
    with whole_folder(out, asked.force) as folder:
        report = _write(source, folder, out, origin, base, asked, _limit(asked))
        _write_report(report, folder)
    return report


def _approximated(
    adapter: SavedAdapter, base: str | None, rule: str, texts: list[str] | None
) -> tuple[Source, Approximation]:
    """An adapter without an exact fold as the source of one that comes near it."""
    model = trained_model(adapter, base)
    near, _ = approximate_in_place(model, rule, batches=_batches(model, texts, adapter.config))
    source = native.from_model(model)
    known = base_config(base or adapter.config.base_model_name_or_path, adapter.config.revision)
    dtype = getattr(known, "dtype", None) or source.dtype
    source.notes.extend(adapter.notes)
    return replace(source, dtype=dtype, folder=adapter.folder, classes=read_classes(adapter.folder)), near


def _batches(model: nn.Module, texts: list[str] | None, config: PeftConfig | None) -> list[dict[str, Tensor]]:
    return [] if texts is None else [{"input_ids": ids} for ids in _tokens(model, texts, config)]


def _tokens(model: nn.Module, texts: list[str], config: PeftConfig | None) -> list[Tensor]:
    """The texts as the base that the adapter's config names reads them."""
    inner: Any = live_base(model)
    base, revision = (config.base_model_name_or_path, config.revision) if config else (None, None)
    return tokenise(texts, base, inner.config, revision)


def _check_out(out: Path, adapter: Path | None, base: str | None) -> None:
    """What `force` would delete must be a fold, and not what this one is made from.

    Raises:
        FileExistsError: `out` holds a file that no fold wrote.
        RankfoldError: `out` is or holds the adapter or the base model.
    """
    for what, path in (("the adapter", adapter), ("the base model", Path(base) if base else None)):
        if path is not None and path.exists() and path.resolve().is_relative_to(out.resolve()):
            raise RankfoldError(
                f"out={str(out)!r} holds {what} itself, which the fold would replace; choose another folder"
            )
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose a folder")
    try:
        written = json.loads((out / REPORT).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        written = {}
    ours = {REPORT, CARD, *written} if written else set()
    foreign = sorted(str(f.relative_to(out)) for f in out.rglob("*") if not f.is_dir() or f.is_symlink())
    foreign = [name for name in foreign if Path(name).as_posix() not in ours]
    if foreign:
        raise FileExistsError(
            f"{out} exists and holds {foreign[0]}, which was not written by a fold; choose another folder, --force replaces "
            "earlier folds only"
        )


def _weighed(
    limit: CompressionLimit, source: Source, texts: list[str], trained: Callable[[], nn.Module]
) -> CompressionLimit:
    """The limit with the moments of the texts; the trained model is loaded when the rest is known to fit."""
    if not limit:
        raise RankfoldError("calibration weighs what compression cuts off; give rank or error with it")
    odd = next((s for s in source.sites if s.name in source.adapted and not kind_named(s.kind).linear), None)
    if odd is not None:
        raise RankfoldError(
            f"calibration weighs inputs of linear layers, and the adapted {odd.name} is of kind {odd.kind!r}; compress without it"
        )
    model = trained()
    batches = _tokens(model, texts, source.config)
    return replace(limit, moments=second_moments(live_base(model), source.adapted, batches))


def _limit(options: CheckedOptions) -> CompressionLimit:
    return CompressionLimit(options.rank, options.error)


def _write(
    source: Source,
    folder: Path,
    out: Path,
    origin: str,
    base: str | None,
    options: CheckedOptions,
    limit: CompressionLimit,
) -> FoldReport:
    chosen, strict = PROFILES[options.profile], options.strict
    to = source.dtype if options.dtype is None else DTYPES[options.dtype]
    if to not in DTYPES.values():
        to = torch.float32  # a quantised base: factors are not stored as its integers

    if source.output_head and options.profile in ("gguf", "mlx"):
        raise RankfoldError(
            f"target_modules: {source.output_head} is the output head, whose LoRA profile {options.profile} does not write; "
            "fold with profile uniform or compact, which PEFT, vLLM and SGLang load, or merged"
        )
    check_kinds(source, options.profile)
    if source.vocabulary and options.profile != "merged":
        key, rows = next((name, len(tensor)) for name, tensor in source.vocabulary.items())
        raise RankfoldError(
            f"the adapter has {key} with {rows} rows, which PEFT saves where the vocabulary was resized, and no LoRA holds a "
            "whole embedding; fold with --profile merged"
        )
    adapted = set(source.adapted)
    rounded: dict[str, Factors] = {}
    layers = []
    for site in tqdm(source.sites, "folding", delay=1.0, leave=False, disable=None if options.progress else True):
        if site.name in adapted:
            rounded[site.name], proof = _fold(site.name, source, lambda f: chosen.rounded(f, to), limit)
            layers.append(proof)
        else:
            zero = Factors(torch.zeros(0, site.in_features), torch.zeros(site.out_features, 0))
            rounded[site.name] = chosen.rounded(zero, to)
    for name, head in source.whole.items():
        if not torch.isfinite(head.detach().to("cpu", to)).all():
            raise RankfoldError(
                f"{name} is not finite in {to}; give --dtype float32, or an adapter that has not diverged"
            )
    base = base or source.config.base_model_name_or_path
    folded = Folded(source, rounded, to, base, out, options.pad)
    written = chosen.write(folded, folder)
    layers = [_on_disk(proof, source, rounded[proof.module], written.read(proof.module)) for proof in layers]
    worst = max(layers, key=lambda p: p.frobenius)
    if strict is not None and not worst.frobenius <= strict:
        raise RankfoldError(
            f"strict={strict}: the relative error of {worst.module} is {worst.frobenius:.1e} on disk, of which compression "
            f"{worst.truncation:.1e} and rounding to {to} {worst.rounding:.1e}; nothing was written. Give more rank, less "
            "error or dtype float32"
        )
    empty = not any(proof.norm for proof in layers)
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return FoldReport(
        adapter=origin,
        method=source.method,
        profile=options.profile,
        base=base,
        rank=written.rank,
        needed_rank=folded.rank,
        dtype=str(to).removeprefix("torch."),
        parameters=written.parameters,
        bytes=sum(f.stat().st_size for f in files),
        layers=layers,
        probe={"skipped": "not asked for"},
        serve=written.serve,
        notes=[*source.notes, *written.notes, *(["every update is zero: this fold changes nothing"] if empty else [])],
        sha256={f.relative_to(folder).as_posix(): sha256(f) for f in files},
        noun=chosen.noun,
        left_out=source.left_out,
    )


def _fold(
    name: str, source: Source, rounded: Callable[[Factors], Factors], limit: CompressionLimit
) -> tuple[Factors, LayerProof]:
    """One module's factors as they will be in the file, and their proof."""
    trained = source.update(name)
    values = trained if isinstance(trained, Tensor) else trained.baked().up
    if not torch.isfinite(values).all():
        raise RankfoldError(f"{name}: its update is not finite; that training diverged, use an earlier checkpoint")
    if isinstance(trained, Tensor) and not limit:
        raise RankfoldError(
            f"{source.method}: its update is not a product of small matrices, so a LoRA can only come near it; say how near "
            "with --error 0.01, or how large with --rank N"
        )
    exact = Factors(trained[:0], trained[:, :0]) if isinstance(trained, Tensor) else lowered(trained)
    moment = limit.moment(name)
    cut = compress(trained, limit, moment) if limit else None
    factors = rounded(_live(exact if cut is None else cut))
    if not all(torch.isfinite(part).all() for part in (factors.down, factors.up)):
        raise RankfoldError(
            f"{name}: its factors are too large for {factors.up.dtype}; give --dtype bfloat16 or float32"
        )
    return factors, prove(name, trained, exact, factors.to(torch.float64), cut=cut, moment=moment)


def lowered(update: Factors) -> Factors:
    """Balanced, without the components that add nothing, and of no higher rank than a matrix of its shape can have."""
    live = _live(update)
    return live.compress(rank=min(live.shape)) if live.rank > min(live.shape) else live


def _live(update: Factors) -> Factors:
    return update.alive().balanced()


def _on_disk(proof: LayerProof, source: Source, rounded: Factors, read: Update) -> LayerProof:
    """The proof, about what is on the disk; raises OSError where that is not what was written."""
    if isinstance(read, Tensor):  # no factors, but what was added to a weight
        return prove_sum(proof, source.update(proof.module), rounded.to(torch.float64), read)
    rank = rounded.rank
    same = torch.equal(read.down[:rank], rounded.down) and torch.equal(read.up[:, :rank], rounded.up)
    if not same or read.scale != rounded.scale or read.down[rank:].any() or read.up[:, rank:].any():
        raise OSError(
            f"{proof.module}: what was read back from the disk is not what was written; the disk may be full or broken"
        )
    return proof


def _write_report(report: FoldReport, folder: Path) -> None:
    (folder / REPORT).write_text(report.to_json(), encoding="utf-8")
    library = PROFILES[report.profile].library
    card = f"---\nlibrary_name: {library}\nbase_model: {report.base}\ntags: [lora, rankfold]\n---\n\n"
    card += (
        f"# {report.noun[0].upper()}{report.noun[1:]}, folded from {report.method}\n\n```\n{report.summary()}\n```\n\n"
    )
    card += f"Made by rankfold; the errors per layer are in `{REPORT}`.\n"
    (folder / CARD).write_text(card, encoding="utf-8")
