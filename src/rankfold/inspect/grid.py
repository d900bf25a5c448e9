"""Module names laid out as a grid: a row per layer, a column per kind of module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """Where each module stands.

    Args:
        rows: labels of the layers, in the model's order.
        columns: labels of the kinds, shortest that are unique, in the order of their first module.
        cells: by module name, (row, column).
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: dict[str, tuple[int, int]]

    def table(self, values: dict[str, float], missing: float) -> list[list[float]]:
        """Values by module as rows × columns."""
        table = [[missing] * len(self.columns) for _ in self.rows]
        for name, value in values.items():
            row, column = self.cells[name]
            table[row][column] = value
        return table


def grid(names: Iterable[str]) -> Grid:
    """Lays out module names, which must differ."""
    names = list(names)
    places = {name: place(name, merge=True) for name in names}
    if len(set(places.values())) < len(names):
        places = {name: place(name, merge=False) for name in names}
    layers = list(dict.fromkeys((stack, layer) for stack, layer, _ in places.values()))
    kinds = list(dict.fromkeys(kind for *_, kind in places.values()))
    stacks = list(dict.fromkeys(stack for stack, layer in layers if layer is not None))
    short = dict(zip(stacks, _distinguishing(stacks), strict=True))
    rows = ["–" if layer is None else f"{short[stack]} {layer}".strip() for stack, layer in layers]
    cells = {name: (layers.index((s, i)), kinds.index(kind)) for name, (s, i, kind) in places.items()}
    return Grid(tuple(rows), tuple(shortest_suffixes(kinds)), cells)


def place(name: str, merge: bool = True) -> tuple[str, int | None, str]:
    """(stack, layer, kind): what stands before the first number, the number, and what stands behind it.

    Args:
        merge: take further numbers out of the kind, so that T5's `layer.1.…wi` and `layer.2.…wi` are one.

    >>> place("model.layers.11.self_attn.q_proj")
    ('model.layers', 11, 'self_attn.q_proj')
    """
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdigit() and i and parts[i - 1] != "experts":
            kind = parts[i + 1 :]
            if merge:
                inner = kind[:-1]
                kind = [p for k, p in enumerate(inner) if not p.isdigit() or inner[k - 1] == "experts"] + kind[-1:]
            return ".".join(parts[:i]), int(part), ".".join(kind)
    return "", None, name


def shortest_suffixes(names: Sequence[str]) -> list[str]:
    """The shortest ends (whole parts) that tell the names apart.

    >>> shortest_suffixes(["attn.c_attn", "attn.c_proj", "mlp.c_proj"])
    ['c_attn', 'attn.c_proj', 'mlp.c_proj']
    """

    def end(name: str, parts: int) -> str:
        return ".".join(name.split(".")[-parts:])

    found = []
    for name in names:
        parts = 1
        while end(name, parts) != name and sum(end(other, parts) == end(name, parts) for other in names) > 1:
            parts += 1
        found.append(end(name, parts))
    return found


def _distinguishing(stacks: Sequence[str]) -> list[str]:
    """What tells stacks apart: "encoder" and "decoder" of "encoder.block" and "decoder.block"; nothing for one stack."""
    if len(stacks) < 2:
        return [""] * len(stacks)
    parts = [stack.split(".") for stack in stacks]
    while all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    while all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    return [".".join(p) for p in parts]
