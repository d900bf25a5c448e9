"""Entities in the tags of words, and how well they were found."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

Entity = tuple[int, int, str]
"""First word, the word behind its last, type."""

_MARKED = re.compile(r"O|[BIESLU]-.+")


def are_marked(tags: Iterable[str]) -> bool:
    """Whether tags say where entities begin and go on (BIO, IOB2, BIOES, BILOU), and are not of each word alone."""
    found = set(tags)
    return any(tag != "O" for tag in found) and all(_MARKED.fullmatch(tag) for tag in found)


def entities(tags: Sequence[str], marked: bool = True) -> set[Entity]:
    """The entities of a row, as the scorer of CoNLL-2000 counts them: an entity that does not begin with B begins all the same.

    Args:
        marked: tags are; else every word is an entity of its own.
    """
    if not marked:
        return {(i, i + 1, tag) for i, tag in enumerate(tags)}
    found, began, kind = set(), 0, ""
    for i, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if kind and not (mark in "IEL" and name == kind):
            found.add((began, i, kind))
            kind = ""
        if name and not kind:
            began, kind = i, name
        if kind and mark in "ESLU":
            found.add((began, i + 1, kind))
            kind = ""
    return found


def precision_recall_f1(true: Iterable[set[Entity]], predicted: Iterable[set[Entity]]) -> dict[str, float]:
    """Over all rows: the share of what was found that is right, of what is there that was found, and their harmonic mean; then the
    latter for each type as `f1_TYPE`. Zero where nothing can be right."""
    right, there, said = Counter[str](), Counter[str](), Counter[str]()
    for t, p in zip(true, predicted, strict=True):
        for counter, some in ((right, t & p), (there, t), (said, p)):
            counter.update(kind for _, _, kind in some)
    hits, wanted, given = right.total(), there.total(), said.total()
    by_type = {f"f1_{kind}": _f1(right[kind], there[kind], said[kind]) for kind in sorted(there)}
    return {
        "precision": hits / given if given else 0.0,
        "recall": hits / wanted if wanted else 0.0,
        "f1": _f1(hits, wanted, given),
    } | by_type


def _f1(right: int, there: int, said: int) -> float:
    return 2 * right / (there + said) if right else 0.0
