"""Intervals of F1, whose scores of rows are influences (macro F1) or ratios with weights of their own (F1 of entities): how often a
comparison of equal contenders says that one is better, and how often a contender's own interval holds the truth.

    OMP_NUM_THREADS=1 python benchmarks/f1_intervals.py              # writes results/f1-intervals.json; about an hour on a quiet core
    OMP_NUM_THREADS=1 python benchmarks/f1_intervals.py --worlds 50  # a look; writes nothing

Worlds, families and errors as in family_wise.py. Macro F1 has three classes of 85, 12 and 3 % of the rows.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
from family_wise import error, false_verdicts
from numpy.typing import NDArray

from rankfold.compare.intervals import Rows, alone
from rankfold.tasks.macro_f1 import macro_f1_by_row

OUT = Path(__file__).parent / "results" / "f1-intervals.json"
Array = NDArray[np.float64]
SHARES = (0.85, 0.12, 0.03)


@dataclass(frozen=True)
class Cell:
    """One kind of world.

    Args:
        metric: "macro F1" or "F1 of entities".
        spread: standard deviation that a seed moves the skill by; the rows' own is 1.2, a single score's noise 0.6.
    """

    metric: str
    rows: int
    seeds: int
    contenders: int
    spread: float


def grid() -> list[Cell]:
    sizes = ((3, 2), (3, 5), (5, 5), (5, 12))
    cells = product(("macro F1", "F1 of entities"), (100, 400, 2000), sizes, (0.0, 0.3))
    return [Cell(metric, rows, *size, spread) for metric, rows, size, spread in cells]


def world(cell: Cell, rng: np.random.Generator) -> tuple[Array, Rows]:
    """The metric, contenders × seeds, and the scores of the rows of all trials."""
    size = cell.contenders, cell.seeds, cell.rows
    skill = rng.normal(0, cell.spread, size[:2]) + rng.normal(0, cell.spread, cell.seeds)
    hard = rng.normal(0, 1.2, cell.rows) + rng.normal(0, 0.3, (cell.contenders, 1, cell.rows))
    latent = skill[:, :, None] + hard + rng.normal(0, 0.6, size)
    if cell.metric == "macro F1":
        true = rng.choice(3, cell.rows, p=SHARES)
        other = rng.choice(3, size, p=SHARES)
        other = np.where(other == true, (true + rng.integers(1, 3, size)) % 3, other)
        said = np.where(latent + 1 > 0, true, other)
        scores = np.array([macro_f1_by_row(true, one) for one in said.reshape(-1, cell.rows)])  # pyright: ignore
        return scores.mean(1).reshape(size[:2]), Rows(scores)
    there, found = rng.poisson(1.0, cell.rows), 1 / (1 + np.exp(-2 * (latent + 0.7)))
    right = rng.binomial(there, found)
    counts = (there + right + rng.poisson(0.6 * (1 - found))).astype(float).reshape(-1, cell.rows)
    scores = 2 * right.reshape(-1, cell.rows) / np.maximum(counts, 1)
    return ((scores * counts).sum(1) / counts.sum(1)).reshape(size[:2]), Rows(scores, counts)


def truth(metric: str, spread: float) -> float:
    """The metric on endless rows, in the mean over seeds."""
    rng, one = np.random.default_rng(5), Cell(metric, 20_000, 1, 1, spread)
    return float(np.mean([world(one, rng)[0] for _ in range(400 if spread else 20)]))


@dataclass(frozen=True)
class Result:
    """Shares of worlds: with a false verdict, by family, and in which the first contender's interval holds the truth."""

    cell: Cell
    worlds: int
    reference: float
    others: float
    held: float


def measure(cell: Cell, worlds: int) -> Result:
    rng = np.random.default_rng([cell.rows, cell.seeds, cell.contenders, int(10 * cell.spread), len(cell.metric)])
    wanted, counted = truth(cell.metric, cell.spread), np.zeros(3)
    places = {str(c): {s: c * cell.seeds + s for s in range(cell.seeds)} for c in range(cell.contenders)}
    for _ in range(worlds):
        found, rows = world(cell, rng)
        tests = {str(c): dict(enumerate(map(float, found[c]))) for c in range(cell.contenders)}
        false = false_verdicts(tests, rows, places)
        half = alone(list(found[0]), rows.variance(range(cell.seeds)), rows.freedom)
        counted += [*false, half is not None and abs(found[0].mean() - wanted) <= half]
    return Result(cell, worlds, *map(float, counted / worlds))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--worlds", type=int, help="comparisons for each cell (default: 600)")
    worlds = parser.parse_args().worlds
    found = []
    print("metric          rows seeds contenders spread  false: reference, others (%)   interval holds (%, error)")
    for cell in grid():
        found.append(r := measure(cell, worlds or 600))
        print(
            f"{cell.metric:15} {cell.rows:4} {cell.seeds:5} {cell.contenders:10} {cell.spread:6}  {100 * r.reference:8.1f} "
            f"{100 * r.others:8.1f} {100 * r.held:22.1f} ±{100 * error(r.held, r.worlds):.1f}",
            flush=True,
        )
    if worlds is None:
        OUT.write_text(json.dumps([asdict(r) for r in found], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(OUT)


if __name__ == "__main__":
    main()
