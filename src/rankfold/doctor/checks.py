"""What is wrong with an adapter whatever reads it: pure functions from a case to findings about the file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig

import rankfold.methods  # noqa: F401  (registers the methods with PEFT)
from rankfold.doctor.case import Case
from rankfold.doctor.findings import Finding, Status
from rankfold.text import examples

FLOATS = {"F64", "F32", "F16", "BF16"}


def check(case: Case) -> list[Finding]:
    """Every check that applies to the format."""
    checks: list[Callable[[Case], Iterator[Finding]]] = [pickled, dtypes, base_shapes, base_rope]
    if case.is_lora:
        checks += [pairing]
    if case.file.kind == "peft" and case.is_lora:
        checks += [belonging]
    if case.file.kind == "peft" and case.file.config:
        checks += [unknown_keys]
        if case.is_lora:
            checks += [ranks, targets, alpha_type]
    if case.file.kind == "gguf":
        checks += [gguf_scales]
    return [finding for one in checks for finding in one(case)]


def pickled(case: Case) -> Iterator[Finding]:
    if case.file.pickled and case.file.weights:
        yield Finding(
            Status.PROBLEM,
            "the weights are a pickle, which can run code when it is opened; it was not opened, so no tensor was checked",
            case.file.weights.name,
            f"ask for safetensors; where it holds tensors alone, rankfold doctor {case.file.path} --fix OUT writes them",
        )


def pairing(case: Case) -> Iterator[Finding]:
    lone = [p.module for p in case.pairs if p.a is None or p.b is None]
    if lone:
        yield Finding(
            Status.PROBLEM, f"A without B, or B without A: {examples(lone)}", lone[0], "save the adapter again"
        )
    flat = [p.module for p in case.pairs if any(h and len(h.shape) < 2 for h in (p.a, p.b))]
    if flat:
        yield Finding(Status.PROBLEM, f"factors that are not matrices: {examples(flat)}", flat[0], "save it again")
    empty = [p.module for p in case.pairs if p.a and p.a.shape and p.a.shape[0] == 0]
    if empty:
        yield Finding(
            Status.PROBLEM, f"factors of rank 0: {examples(empty)}", empty[0], "fold it: zeros take their place"
        )
    torn = [
        p for p in case.whole if p.a and p.b and min(len(p.a.shape), len(p.b.shape)) >= 2 and _torn(p.a.shape, p.b.shape)
    ]  # fmt: skip
    if torn and torn[0].a and torn[0].b:
        what = (
            f"A {torn[0].a.shape} and B {torn[0].b.shape} of {examples([p.module for p in torn])} have different ranks"
        )
        yield Finding(Status.PROBLEM, what, torn[0].module, "save the adapter again")


def _torn(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether these are not of one rank; of a convolution with groups PEFT's B has the rank of one group in its columns."""
    rank, columns = a[0], b[1]
    return rank % columns != 0 if len(b) > 2 and columns else rank != columns


def dtypes(case: Case) -> Iterator[Finding]:
    by_dtype: dict[str, str] = {}
    for name, header in case.file.tensors.items():
        by_dtype.setdefault(header.dtype, name)
    if case.file.kind == "gguf":
        return
    for dtype in sorted(set(by_dtype) - FLOATS):
        what = f"dtype {dtype} of {by_dtype[dtype]}: factors must be floating point of 16 bits or more"
        yield Finding(Status.PROBLEM, what, by_dtype[dtype], "save it as bfloat16 or float32")
    if "F64" in by_dtype:
        yield Finding(Status.NOTE, "float64 doubles the file; engines round it", by_dtype["F64"], "save it as float32")
    floats = sorted(set(by_dtype) & FLOATS)
    if len(floats) > 1:
        what = f"dtypes are mixed ({', '.join(floats)}); llama.cpp's converter upcasts, others cast to the base's"
        yield Finding(Status.NOTE, what, by_dtype[floats[0]], "save all in the base's dtype")


def base_shapes(case: Case) -> Iterator[Finding]:
    """The base has the modules, and they have these shapes."""
    base = case.base
    if base is None or case.file.kind == "gguf":
        return
    if not base.shapes:
        yield Finding(Status.NOTE, f"shapes were not compared with the base: {base.why_not}", str(base.folder))
        return
    missing = [p.module for p in case.pairs if not base.has(p.module)]
    fix = "give the base it was trained on with --base FOLDER"
    if missing and case.file.kind != "diffusers":
        what = f"{len(missing)} of {len(case.pairs)} adapted modules are not in the base '{base.folder}': {examples(missing)}"
        yield Finding(Status.PROBLEM, what, missing[0], fix)
    for p in case.whole:
        if (theirs := base.shape(p.module)) and p.a and p.b and len(p.a.shape) == len(p.b.shape) == 2:
            ours = (p.b.shape[0], p.a.shape[1])
            if ours != theirs:
                what = (
                    f"the update of {p.module} is {ours[0]}×{ours[1]}, but the base's module is {theirs[0]}×{theirs[1]}"
                )
                yield Finding(Status.PROBLEM, f"another base: {what} ('{base.folder}')", p.module, fix)
                return


def base_rope(case: Case) -> Iterator[Finding]:
    """Engines that read rope_theta at the top level take 10000 where transformers 5 wrote only rope_parameters."""
    config = case.base.config if case.base else {}
    part = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    rope = part.get("rope_parameters") if isinstance(part, dict) else None
    theta = rope.get("rope_theta") if isinstance(rope, dict) else None
    if case.base and isinstance(part, dict) and theta not in (None, 10000) and "rope_theta" not in part:
        what = (
            f"the base's config has rope_theta={theta} in rope_parameters alone; mlx-lm and others take 10000 instead"
        )
        fix = f"write rope_theta: {theta} at the top level of its config.json"
        yield Finding(Status.NOTE, what, str(case.base.folder / "config.json"), fix)


def unknown_keys(case: Case) -> Iterator[Finding]:
    configs: dict[str, type] = {str(getattr(k, "value", k)): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    config = configs.get(case.settings.peft_type, LoraConfig)
    known = {f.name for f in dataclasses.fields(config)}
    unknown = sorted(set(case.file.config) - known)
    if unknown:
        what = f"keys that PEFT 0.21 does not know: {', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}"
        why = "; it ignores them with a warning, older PEFT raises"
        yield Finding(Status.NOTE, what + why, case.file.where(unknown[0]), "remove them")


def ranks(case: Case) -> Iterator[Finding]:
    """r and rank_pattern agree with the shapes."""
    wrong = case.contradicted
    if wrong:
        key = "rank_pattern" if case.settings.rank_pattern else "r"
        first = wrong[0]
        what = (
            f"{key} gives {first.module} rank {case.settings.rank(first.module)}, its tensors have rank {first.rank} "
            f"({len(wrong)} of {len(case.pairs)} modules differ)"
        )
        yield Finding(Status.PROBLEM, what, case.file.where(key), f"write the ranks of the tensors into {key}")


def targets(case: Case) -> Iterator[Finding]:
    """target_modules and the tensors name the same modules."""
    targets = case.settings.target_modules
    if targets is None or not case.file.tensors:
        return
    where = case.file.where("target_modules")
    names = [*(p.module for p in case.pairs), *case.other_names]
    if isinstance(targets, list):
        parameters = {part for t in case.settings.target_parameters for part in t.split(".")}
        idle = [t for t in targets if t not in parameters and not any(f".{t}." in f".{n}." for n in names)]
        if idle:
            what = f"target_modules that match no tensor: {examples(idle)}"
            yield Finding(Status.PROBLEM, what, where, "remove them, or find the missing tensors")
    missed = [p.module for p in case.pairs if not case.settings.targets(p.module)]
    if missed:
        keys = [k for k in ("exclude_modules", "layers_to_transform") if case.file.config.get(k) not in (None, [], "")]
        named = "target_modules" + (f" with {' and '.join(keys)}" if keys else "")
        what = f"tensors of modules that {named} does not name (PEFT would drop them): {examples(missed)}"
        yield Finding(
            Status.PROBLEM, what, where, f"mend {' or '.join(keys)}" if keys else "add them to target_modules"
        )


def belonging(case: Case) -> Iterator[Finding]:
    """Nothing is inside that PEFT does not put there, and what the config promises is."""
    foreign = case.others.get("foreign", []) + case.others.get("alpha", [])
    if foreign:
        what = f"tensors that do not belong in a LoRA: {examples(foreign)}"
        fix = "save it with save_pretrained; keys are base_model.model.MODULE.lora_A.weight and .lora_B.weight"
        yield Finding(Status.PROBLEM, what, foreign[0], fix)
    if case.bare:
        what = f"keys lack the prefix base_model.model., so PEFT applies none of them: {examples(case.bare)}"
        yield Finding(Status.PROBLEM, what, case.bare[0], "write base_model.model. before each key")
    if case.wrapped:
        what = f"keys hold names of wrappers or a doubled prefix, so that nothing is applied: {examples(case.wrapped)}"
        yield Finding(Status.PROBLEM, what, case.wrapped[0], f"rankfold doctor {case.file.path} --fix OUT")
    if case.named:
        what = f"keys hold the adapter's name, which engines do not read: {examples(case.named)}"
        yield Finding(Status.NOTE, what, case.named[0], f"rankfold doctor {case.file.path} --fix OUT")
    if case.unsaved:
        what = f"modules_to_save names {examples(case.unsaved)}, whose tensors are not under PEFT's name"
        yield Finding(Status.PROBLEM, what, case.file.where("modules_to_save"), case.to_save_again)
    if case.file.tensors and not (case.pairs or case.others.get("embedding") or case.others.get("parameter")):
        what = "none of its tensors is a LoRA factor (base_model.model.MODULE.lora_A.weight)"
        yield Finding(Status.PROBLEM, what, next(iter(case.file.tensors)), "save it with save_pretrained")


def alpha_type(case: Case) -> Iterator[Finding]:
    if isinstance(case.file.config.get("lora_alpha"), float):
        what = f"lora_alpha={case.file.config['lora_alpha']} is a float; Ollama parses an integer"
        yield Finding(Status.NOTE, what, case.file.where("lora_alpha"), "rankfold fold writes an integer")


def gguf_scales(case: Case) -> Iterator[Finding]:
    """A GGUF keeps one alpha; what the scales should have been is no longer known."""
    alpha = case.file.config.get("adapter.lora.alpha")
    ranks = sorted({p.rank for p in case.whole})
    if len(ranks) > 1 and isinstance(alpha, float) and alpha:
        what = (
            f"one alpha={alpha:g} over ranks {ranks[0]} to {ranks[-1]}: scales from {alpha / ranks[-1]:.4g} to "
            f"{alpha / ranks[0]:.4g}, right only if B was scaled for it"
        )
        yield Finding(Status.NOTE, what, "adapter.lora.alpha", "run the doctor on the adapter it was converted from")
