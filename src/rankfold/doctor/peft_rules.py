"""The rules of PEFT's own loading: small functions from a case to what PEFT makes of one thing in it."""

from __future__ import annotations

from collections.abc import Iterator

from peft import PEFT_TYPE_TO_CONFIG_MAPPING

from rankfold.doctor.case import Case
from rankfold.doctor.findings import Finding, Status
from rankfold.doctor.peft_trial import refusal
from rankfold.doctor.rules import fold_command
from rankfold.host.peft_api import renamed_on_loading
from rankfold.io.adapter_names import PREFIX
from rankfold.io.adapters import CONFIG
from rankfold.text import examples, short_repr


def known_type(case: Case) -> Iterator[Finding]:
    if case.ours:
        what = (
            f"peft_type={case.settings.peft_type} is unknown to stock PEFT; PEFT loads it where rankfold was imported"
        )
        yield Finding(
            Status.REFUSED, what, case.file.where("peft_type"), f"import rankfold first, or {fold_command(case)}"
        )
    elif case.settings.peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        what = f"peft_type={short_repr(case.settings.peft_type)} is unknown to PEFT"
        yield Finding(Status.REFUSED, what, case.file.where("peft_type"), "write the type it was trained with")


def values(case: Case) -> Iterator[Finding]:
    """Values on which PEFT stops."""
    for key in ("rank_pattern", "alpha_pattern"):
        if key in case.file.config and case.file.config[key] is None:
            what = f"{key} is null, on which PEFT stops (AttributeError)"
            yield Finding(Status.REFUSED, what, case.file.where(key), "write {}")
    if not case.ours and (said := refusal(case.file.config)):
        fix = "correct the value, or load it with the version of PEFT that wrote it"
        yield Finding(Status.REFUSED, f"PEFT stops at the config: {said}", CONFIG, fix)
    empty = [n for n, header in case.file.tensors.items() if 0 in header.shape]
    if empty:
        yield Finding(Status.REFUSED, f"tensors of size zero: {examples(empty)}", empty[0], "save it again")
    if case.unsaved:
        what = f"modules_to_save names {examples(case.unsaved)}, whose tensors are not under PEFT's name (KeyError)"
        yield Finding(Status.REFUSED, what, case.file.where("modules_to_save"), case.to_save_again)
    shapes = case.base.shapes if case.base else {}
    for name in case.others.get("vocabulary", []):
        known = shapes.get(name.removeprefix("base_model.model.").removesuffix(".weight"))
        rows, *width = case.file.tensors[name].shape or (0,)
        if known and width and width[0] in known and (theirs := sum(known) - width[0]) != rows:
            what = f"{name} has {rows} rows, the base {theirs}: the vocabulary was resized"
            yield Finding(Status.REFUSED, what, name, f"call resize_token_embeddings({rows}) on the base first")


def renamed(case: Case) -> Iterator[Finding]:
    """Modules that transformers has given other names since: target_modules are looked for among those of today, and only of some
    models are the tensors' names changed with them."""
    if case.base is None or case.base.model is None or not case.is_lora:
        return
    now = {p.module: name for p in case.whole if (name := case.base.name_now(p.module)) != p.module}
    found = renamed_on_loading([f"{PREFIX}{module}.lora_A.weight" for module in now], case.base.model)
    for module, name in now.items():
        named = case.settings.targets(name)
        if named and f"{PREFIX}{name}.lora_A.weight" in found:
            continue
        what = f"{module} is called {name} in this version of transformers, and PEFT {'does not apply its tensors' if named else 'finds no target_modules'} there"
        yield Finding(Status.IN_PART, what, module, fold_command(case))
        return


def targets(case: Case) -> Iterator[Finding]:
    """PEFT stops where target_modules match nothing in the base, and applies nothing of what they do not match."""
    given, modules = case.settings.target_modules, [p.module for p in case.pairs]
    if given is None or case.settings.target_parameters or not case.is_lora or not modules:
        return
    base = case.base
    if base is not None and any(base.name_of(f"{module}.weight")[1] for module in modules):
        return  # of experts one by one, whose names PEFT exchanges for those of fused ones
    where = case.file.where("target_modules")
    if not any(map(case.settings.targets, base.shapes if base and base.shapes else modules)):
        what = f"target_modules={short_repr(given)} match no module of the base"
        yield Finding(Status.REFUSED, what, where, f"correct them, or {fold_command(case)}")
    elif missed := [module for module in modules if not case.settings.targets(module)]:
        yield Finding(
            Status.IN_PART, f"target_modules do not name {examples(missed)}", where, "add them to target_modules"
        )


def stated_ranks(case: Case) -> Iterator[Finding]:
    wrong = case.contradicted
    if wrong:
        what = f"{wrong[0].module} has rank {wrong[0].rank}, the config says {case.settings.rank(wrong[0].module)}"
        yield Finding(Status.REFUSED, what, case.file.where("r"), "correct r or rank_pattern")
