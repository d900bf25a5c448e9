"""How far two adapters, or two models, are apart, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from rankfold.algebra.combination import check_shapes, module_places, named_base
from rankfold.algebra.models import ModelPair
from rankfold.errors import RankfoldError
from rankfold.fold import source_of
from rankfold.fold.source import Update
from rankfold.io.files import to_json
from rankfold.io.formats import SavedAdapter, is_adapter, read_adapter
from rankfold.kernel.factors import Factors
from rankfold.text import short_number, table

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class LayerDifference:
    """One module, or one tensor of a model, in float64.

    Args:
        module: its name.
        norm_a, norm_b: ‖ΔA‖_F and ‖ΔB‖_F, of models ‖W‖_F; 0 where one does not have it.
        distance: ‖ΔB − ΔA‖_F.
        inner: ⟨ΔA, ΔB⟩, the sum of the products of their entries.
    """

    module: str
    norm_a: float
    norm_b: float
    distance: float
    inner: float

    @property
    def relative(self) -> float | None:
        """The distance relative to ‖ΔA‖; None where that is 0."""
        return self.distance / self.norm_a if self.norm_a else None

    @property
    def cosine(self) -> float | None:
        """1 for the same direction, 0 for nothing in common; None where either is 0."""
        size = self.norm_a * self.norm_b
        return max(-1.0, min(1.0, self.inner / size)) if size else None


@dataclass(frozen=True)
class Difference:
    """Two adapters, or two models (`kind`), layer by layer; and all layers as one."""

    a: str
    b: str
    kind: str
    layers: list[LayerDifference]
    notes: list[str]

    @property
    def whole(self) -> LayerDifference:
        """All layers as one long vector."""
        norms = [math.hypot(*(getattr(one, part) for one in self.layers)) for part in ("norm_a", "norm_b", "distance")]
        return LayerDifference("all", *norms, inner=math.fsum(one.inner for one in self.layers))

    def to_json(self) -> str:
        def one(layer: LayerDifference) -> dict[str, object]:
            return {**asdict(layer), "relative": layer.relative, "cosine": layer.cosine}

        return to_json({**asdict(self), "layers": [one(x) for x in self.layers], "whole": one(self.whole)})

    def table(self) -> Table:
        """A row per layer, and one for all."""
        w = "Δ" if self.kind == "adapters" else ""
        shown = table(title=f"A = {self.a}\nB = {self.b}")
        shown.add_column("module" if w else "tensor", overflow="fold")
        for name in (f"‖{w}A‖", f"‖{w}B‖", f"‖{w}B−{w}A‖/‖{w}A‖", "cosine"):
            shown.add_column(name, justify="right", no_wrap=True)
        for layer in (*self.layers, self.whole):
            relative, cosine = layer.relative, layer.cosine
            shown.add_row(
                layer.module,
                short_number(layer.norm_a),
                short_number(layer.norm_b),
                "–" if relative is None else short_number(relative),
                "–" if cosine is None else f"{cosine:.4f}",
                style="bold" if layer.module == "all" else None,
            )
        return shown


def diff(a: str | Path, b: str | Path, *, base: str | None = None) -> Difference:
    """Compares two adapters of any kind that folds, or two model folders.

    Args:
        a, b: two adapter folders, or two models.
        base: of the adapters, if not the one that they name.

    Raises:
        RankfoldError: one adapter and one model, or shapes that differ; and as `fold_adapter` and `extract`.
    """
    adapters = [is_adapter(Path(one)) for one in (a, b)]
    if all(adapters):
        read = [read_adapter(one, base) for one in (a, b)]
        layers, notes = _of_adapters(*read, base=base)
        return Difference(str(read[0].path), str(read[1].path), "adapters", layers, notes)
    if any(adapters):
        one, other = (a, b) if adapters[0] else (b, a)
        raise RankfoldError(
            f"{one} is an adapter and {other} is not; give two adapters or two models (`rankfold fold --profile merged` makes "
            "a model of an adapter)"
        )
    pair = ModelPair(str(a), str(b))
    return Difference(str(a), str(b), "models", list(_of_models(pair)), [*_missing(pair)])


def _of_adapters(
    first: SavedAdapter, second: SavedAdapter, base: str | None
) -> tuple[list[LayerDifference], list[str]]:
    one, other = source_of(first, base), source_of(second, base)
    check_shapes([(str(first.path), one), (str(second.path), other)])
    modules = sorted({*one.adapted, *other.adapted}, key=module_places([one, other]).__getitem__)
    had = [set(s.adapted) for s in (one, other)]
    layers = [
        between(name, *(s.update(name) if name in h else None for s, h in zip((one, other), had, strict=True)))
        for name in modules
    ]
    bases = [named_base(s) for s in (one, other)]
    notes = [] if bases[0] == bases[1] else [f"they name different base models, {bases[0]} and {bases[1]}"]
    if one.heads or other.heads:
        notes.append("trained heads (modules_to_save) are not compared")
    if one.vocabulary or other.vocabulary:
        notes.append("whole embeddings, as PEFT saves them of a resized or trained vocabulary, are not compared")
    return layers, notes


def _of_models(pair: ModelPair) -> Iterator[LayerDifference]:
    for name, before, after in pair.pairs():
        if before.shape != after.shape:
            raise RankfoldError(
                f"{name} is {tuple(before.shape)} in {pair.first} and {tuple(after.shape)} in {pair.second}; they are not of "
                "one architecture"
            )
        yield between(name, before, after)


def _missing(pair: ModelPair) -> Iterator[str]:
    for which, model in enumerate((pair.first, pair.second)):
        for name in pair.only(which):
            yield f"only {model} has {name}"


def between(name: str, a: Update | None, b: Update | None) -> LayerDifference:
    """The distance of two updates; None is an update of zero. Where both have factors, no out × in matrix is made."""
    if a is None or b is None:
        norm = 0.0 if (one := b if a is None else a) is None else float(one.norm())
        return LayerDifference(name, 0.0 if a is None else norm, 0.0 if b is None else norm, norm, 0.0)
    if isinstance(a, Factors) and isinstance(b, Factors):
        one, other = a.baked(), b.baked()
        inner = ((one.up.T @ other.up) * (one.down @ other.down.T)).sum()
        distance = other.minus(one).norm()
    else:
        x, y = _dense(a), _dense(b)
        inner, distance = (x * y).sum(), (y - x).norm()
    return LayerDifference(name, float(a.norm()), float(b.norm()), float(distance), float(inner))


def _dense(update: Update) -> Tensor:
    return update.delta() if isinstance(update, Factors) else update
