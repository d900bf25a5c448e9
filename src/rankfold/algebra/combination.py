"""Σ wᵢ ΔWᵢ of several adapters as the source of a fold.

Factors are put side by side, which is exact. Components that add nothing in float64, because the adapters share them or they
cancel, go: what is rounded later is then relative to the sum and not to its terms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from rankfold.algebra.merging import Rule, rule
from rankfold.errors import RankfoldError
from rankfold.fold import FoldOptions, FoldReport, fold_source, source_of
from rankfold.fold.lora_tensors import parameter_of
from rankfold.fold.sites import of_adapted_types, siblings
from rankfold.fold.source import Source, Update
from rankfold.io.formats import read_adapter
from rankfold.kernel.factors import Factors

#: Singular values below this share of the norm of the terms are float64's own rounding.
ROUNDING = 1e-14


def combine(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float],
    combination: str = "sum",
    density: float | None = None,
    seed: int = 0,
    base: str | None = None,
    **options: Unpack[FoldOptions],
) -> FoldReport:
    """Writes the weighted sum of adapters, of rankfold's methods or of PEFT's, as one plain LoRA.

    Args:
        adapters: folders, each as `fold_adapter` takes it; a module that only some have is kept.
        out: the folder to make; it appears whole or not at all.
        weights: a factor per adapter, of any sign.
        combination: "sum", exact; or "ties", "dare_linear", "dare_ties" (merging.py), which have no small factors and so
            need `rank` or `error`.
        density: of those, the share of each update's entries that is kept, in (0, 1].
        seed: of DARE's choice of entries.
        base: the base model of all of them, where they name different ones.
        options: as in `fold_adapter`.

    Raises:
        RankfoldError: weights that do not fit, adapters of different bases or shapes, two different trained heads; and as
            `fold_adapter`.
    """
    chosen = rule(combination, density, seed)
    _check_weights(weights, len(adapters))
    read = [read_adapter(adapter, base) for adapter in adapters]
    terms = [Term(str(a.path), w, source_of(a, base)) for a, w in zip(read, weights, strict=True)]
    if base is None:
        check_one_base(terms)
    return fold_source(
        combined(terms, chosen),
        out,
        origin=in_words([(t.weight, t.name) for t in terms]),
        inputs=[adapter.path for adapter in read],
        base=base,
        **options,
    )


@dataclass(frozen=True)
class Term:
    """One adapter of a sum; `name` is for messages."""

    name: str
    weight: float
    source: Source


def combined(terms: Sequence[Term], chosen: Rule | None = None) -> Source:
    """The sum as a source; by a rule of merging.py where one is given.

    Raises:
        RankfoldError: a module that two have in different shapes or under different names, or heads that differ.
    """
    check_shapes([(t.name, t.source) for t in terms])
    first = next((t.source for t in terms if t.source.heads), terms[0].source)
    have = [set(t.source.adapted) for t in terms]
    place = module_places([first, *(t.source for t in terms)])
    adapted = sorted(set().union(*have), key=place.__getitem__)
    known = {s.name: s for t in terms for s in (*t.source.sites, *t.source.siblings)}
    sites = sorted(known.values(), key=lambda s: place[s.name])

    def update(name: str) -> Update:
        found = [(t.weight, t.source.update(name)) for t, names in zip(terms, have, strict=True) if name in names]
        return weighted_sum(found) if chosen is None else chosen(name, found)

    heads, notes = _head(terms)
    words, more = _vocabulary(terms)
    return replace(
        first,
        method=in_words([(t.weight, t.source.method) for t in terms]),
        update=update,
        adapted=adapted,
        sites=of_adapted_types(sites, adapted),
        siblings=siblings(sites, adapted),
        modules=list(dict.fromkeys(m for t in (first, *(t.source for t in terms)) for m in t.modules)),
        parameters=list(dict.fromkeys(p for t in terms for p in t.source.parameters)),
        experts={name: once for t in terms for name, once in t.source.experts.items()},
        unlike_peft=sorted({name for t in terms for name in t.source.unlike_peft}),
        heads=heads,
        vocabulary={} if words is None else words.vocabulary,
        folder=(first if words is None else words).folder,  # the tokenizer of those words is beside them
        transposed=any(t.source.transposed for t in terms),
        output_head=next((t.source.output_head for t in terms if t.source.output_head), None),
        notes=[*notes, *more, *(f"{t.name}: {note}" for t in terms for note in t.source.notes)],
    )


def weighted_sum(terms: Sequence[tuple[float, Update]]) -> Update:
    """Σ wᵢ ΔWᵢ: factors where all have them, of no more rank than the sum needs in float64; else out × in."""
    factors = [u.scaled(w) for w, u in terms if isinstance(u, Factors)]
    if len(factors) < len(terms):
        dense = [w * (u.delta() if isinstance(u, Factors) else u) for w, u in terms]
        return torch.stack(dense).sum(0)
    whole = factors[0].concat(*factors[1:])
    if len(factors) == 1 or whole.up.is_meta:
        return whole
    size = math.hypot(*(float(f.norm()) for f in factors))
    u, sigma, vt = whole.svd()
    rank = int((sigma > ROUNDING * size).sum())
    if rank == whole.rank and float(sigma.norm()) > 0.5 * size:
        return whole
    root = sigma[:rank].sqrt()
    return Factors(root[:, None] * vt[:rank], u[:, :rank] * root)


def in_words(terms: Sequence[tuple[float, str]]) -> str:
    """A sum as people write it.

    >>> in_words([(0.5, "a"), (-1, "peft:lora")])
    '0.5·a − 1·peft:lora'
    """
    (weight, name), *others = terms
    return f"{weight:g}·{name}" + "".join(f" {'−' if w < 0 else '+'} {abs(w):g}·{n}" for w, n in others)


def _check_weights(weights: Sequence[float], adapters: int) -> None:
    if not adapters or len(weights) != adapters:
        raise RankfoldError(
            f"weights={list(weights)} has {len(weights)} for {adapters} adapters; give one weight per adapter"
        )
    wrong = next((w for w in weights if not math.isfinite(w)), None)
    if wrong is not None:
        raise RankfoldError(f"weights: {wrong} is not a finite number")


def check_one_base(terms: Sequence[Term]) -> None:
    """Raises RankfoldError where two adapters name different base models, or revisions of one."""
    first, *others = ((t.name, named_base(t.source)) for t in terms)
    for name, base in others:
        if base != first[1]:
            raise RankfoldError(
                f"{first[0]} was trained on base {first[1]} and {name} on {base}, and updates of different weights have no "
                "sum; if it is one model at two places, say so with --base FOLDER"
            )


def named_base(source: Source) -> str:
    """The base model that an adapter names, with its revision where it is not main's."""
    name, revision = source.config.base_model_name_or_path, source.config.revision
    place = str(Path(name).resolve()) if name and Path(name).exists() else str(name)
    return f"{place}@{revision}" if revision not in (None, "main") else place


def check_shapes(sources: Sequence[tuple[str, Source]]) -> None:
    """Raises RankfoldError for a module that two adapters have in different shapes, or under different names."""
    shapes = [(name, {t.name: (t.out_features, t.in_features) for t in s.sites}) for name, s in sources]
    for (name, one), (other, two) in itertools.combinations(shapes, 2):
        differ = next((m for m in one if two.get(m, one[m]) != one[m]), None)
        if differ is not None:
            raise RankfoldError(
                f"{differ} is {one[differ]} (out, in) in {name} and {two[differ]} in {other}; they are of different base models"
            )
        longer = next((m for m in (*one, *two) if _without_prefix(m, two) or _without_prefix(m, one)), None)
        if longer is not None:
            short = _without_prefix(longer, two) or _without_prefix(longer, one)
            raise RankfoldError(
                f"{name} and {other} call a module {longer} and {short}: they were trained on different classes of one base "
                "(task_type), and PEFT loads an adapter for one of them"
            )


def _without_prefix(module: str, names: Mapping[str, object]) -> str | None:
    """Which of `names` is this module's without its first part, where it is not there itself."""
    rest = module.partition(".")[2]
    return rest if rest in names and module not in names else None


def module_places(sources: Sequence[Source]) -> dict[str, int]:
    """Every module of the bases, and every site of a parameter → its place, in the order of the first."""
    parameters = {name: i for i, name in enumerate(dict.fromkeys(p for s in sources for p in s.parameters))}
    sites = [site for s in sources for site in s.sites]
    sites.sort(
        key=lambda site: parameters.get(parameter_of(site), -1)
    )  # the order in which PEFT wraps a module for them
    names = [*(m for s in sources for m in s.modules), *(site.name for site in sites)]
    return {name: i for i, name in enumerate(dict.fromkeys(names))}


def _head(terms: Sequence[Term]) -> tuple[dict[str, Tensor], list[str]]:
    """The one trained head there is, and a note about it."""
    having = [t for t in terms if t.source.heads]
    if not having:
        return {}, []
    first = having[0]
    for other in having[1:]:
        ours, theirs = first.source.heads, other.source.heads
        if not _same(ours, theirs):
            raise RankfoldError(
                f"{first.name} and {other.name} both trained {min({*ours, *theirs})} (modules_to_save) and ended with different "
                "weights, which are not updates of one matrix, so they have no sum; combine adapters without heads"
            )
    return first.source.heads, [f"the trained head is that of {first.name} as it is, whatever its weight in the sum"]


def _vocabulary(terms: Sequence[Term]) -> tuple[Source | None, list[str]]:
    """The adapter whose whole embeddings and output head the sum has, and a note about them."""
    having = [t for t in terms if t.source.vocabulary]
    if not having:
        return None, []
    first = having[0]
    for other in terms:
        theirs = other.source.vocabulary or {
            k: v for k, v in other.source.heads.items() if k in first.source.vocabulary
        }
        if theirs and not _same(first.source.vocabulary, theirs):
            raise RankfoldError(
                f"{first.name} and {other.name} both hold {min({*first.source.vocabulary} & {*theirs} or theirs)} whole, as PEFT "
                "saves it where the vocabulary was resized or trained, and with different weights, which have no sum; combine "
                "adapters of which one alone has it"
            )
    return first.source, [f"the embeddings are those of {first.name} as they are, whatever its weight in the sum"]


def _same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
