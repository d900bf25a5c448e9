"""How often a comparison of equal methods says that one is better: the table of docs/statistics.md.

    OMP_NUM_THREADS=1 python benchmarks/family_wise.py              # about ten minutes on 2 cores; writes results/family-wise.json
    OMP_NUM_THREADS=1 python benchmarks/family_wise.py --worlds 200 # a look; writes nothing

A *world* is one comparison: contenders that are equal in the long run, each trained with the same seeds and measured on the same rows.
It counts as false for a family (the pairs with the reference, or all other pairs) if any interval of the family does not hold 0. At
most 5 % may. A share p of W worlds has the standard error √(p(1−p)/W), which the table states.
"""

from __future__ import annotations

import argparse
import json
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import combinations, product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rankfold.compare.intervals import CONFIDENCE, Pair, Rows, together

OUT = Path(__file__).parent / "results" / "family-wise.json"
Array = NDArray[np.float64]

SEEDS, CONTENDERS = (2, 3, 4, 5, 7, 10), (2, 3, 5, 8, 12)
#: How much the results of each contender move with the seed, as multiples of the cell's spread.
SPREADS = ("equal", "reference 5×", "one other 5×", "half 4×", "two groups alike", "one lost a seed")


@dataclass(frozen=True)
class Cell:
    """One kind of world.

    Args:
        rows: of the test set; 0 for a metric of seeds alone (f1_intervals.py has F1 with its rows).
        scores: "right or wrong" (accuracy) or "losses"; "" without rows.
        spread: standard deviation that a seed moves the skill by; the rows' own is 1.2, a single score's noise 0.6.
        spreads: how the contenders differ in it.
    """

    seeds: int
    contenders: int
    rows: int
    scores: str
    spread: float
    spreads: str


def grid() -> list[Cell]:
    cells = [Cell(s, c, 0, "", 1.0, how) for s, c, how in product(SEEDS, CONTENDERS, SPREADS)]
    for s, c, rows, spread in product((2, 3, 5, 10), (2, 5, 12), (100, 2000), (0.0, 0.05, 0.3)):
        cells.append(Cell(s, c, rows, "right or wrong", spread, "equal"))
    for s, c, how in product((3, 5, 10), (3, 8), SPREADS[1:]):
        cells.append(Cell(s, c, 500, "losses", 0.1, how))
    # Two contenders have no others, and no two groups
    return [c for c in cells if not (c.contenders == 2 and c.spreads != "equal")]


def skills(cell: Cell, rng: np.random.Generator) -> Array:
    """contenders × seeds: what the seeds do, apart from what they do to all contenders alike."""
    moved = rng.normal(0, cell.spread, (cell.contenders, cell.seeds))
    if cell.spreads == "reference 5×":
        moved[0] *= 5
    elif cell.spreads == "one other 5×":
        moved[-1] *= 5
    elif cell.spreads == "half 4×":
        moved[cell.contenders // 2 :] *= 4
    elif cell.spreads == "two groups alike":
        groups = rng.normal(0, cell.spread, (2, cell.seeds))
        moved = 0.5 * moved + groups[np.arange(cell.contenders) % 2]
    return moved + rng.normal(0, cell.spread, cell.seeds)


def world(cell: Cell, rng: np.random.Generator) -> tuple[bool, bool]:
    """Whether the family of the reference, and that of all others, has a false verdict."""
    skill, rows, places = skills(cell, rng), None, None
    if cell.rows:
        hard = rng.normal(0, 1.2, cell.rows) + rng.normal(0, 0.3, (cell.contenders, 1, cell.rows))
        scores = skill[:, :, None] + hard + rng.normal(0, 0.6, (cell.contenders, cell.seeds, cell.rows))
        scores = (scores + 1 > 0).astype(float) if cell.scores == "right or wrong" else scores
        skill, rows = scores.mean(2), Rows(scores.reshape(-1, cell.rows))
        places = {str(c): {s: c * cell.seeds + s for s in range(cell.seeds)} for c in range(cell.contenders)}
    tests = {str(c): dict(enumerate(map(float, skill[c]))) for c in range(cell.contenders)}
    if cell.spreads == "one lost a seed":
        del tests[str(cell.contenders - 1)][0]
    return false_verdicts(tests, rows, places)


def false_verdicts(
    tests: dict[str, dict[int, float]], rows: Rows | None, places: dict[str, dict[int, int]] | None
) -> tuple[bool, bool]:
    """Whether equal contenders, by name, of which "0" is the reference, get a false verdict: in its family, and in that of all others."""
    pairs = list(combinations(tests, 2))
    families = [p for p in pairs if "0" in p], [p for p in pairs if "0" not in p]
    reference, others = (wrong(f, tests, together(f, tests, rows, places)) for f in families)
    return reference, others


def wrong(pairs: list[Pair], tests: dict[str, dict[int, float]], halves: dict[Pair, float]) -> bool:
    for a, b in pairs:
        if (a, b) in halves:
            shared = tests[a].keys() & tests[b].keys()
            if abs(sum(tests[a][s] - tests[b][s] for s in shared)) / len(shared) > halves[a, b]:
                return True
    return False


@dataclass(frozen=True)
class Result:
    """Shares of worlds with a false verdict, by family."""

    cell: Cell
    worlds: int
    reference: float
    others: float

    @property
    def worst(self) -> float:
        return max(self.reference, self.others)


def measure(cell: Cell, worlds: int) -> Result:
    about = [cell.seeds, cell.contenders, cell.rows, int(1000 * cell.spread), SPREADS.index(cell.spreads)]
    rng = np.random.default_rng(about)
    reference, others = np.mean([world(cell, rng) for _ in range(worlds)], axis=0)
    return Result(cell, worlds, float(reference), float(others))


def error(share: float, worlds: int) -> float:
    """Standard error of a share."""
    return math.sqrt(share * (1 - share) / worlds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--worlds", type=int, help="comparisons for each cell (default: 2000, with rows 600)")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    cells = grid()
    worlds = [arguments.worlds or (600 if c.rows else 2000) for c in cells]
    with ProcessPoolExecutor(arguments.workers) as pool:
        found = list(pool.map(measure, cells, worlds))
    print(
        "seeds contenders rows  scores          spread  spreads            against reference  among others  (%, error)"
    )
    for r in found:
        c = r.cell
        told = "   ".join(
            f"{100 * share:5.2f} ±{100 * error(share, r.worlds):.2f}" for share in (r.reference, r.others)
        )
        print(f"{c.seeds:5} {c.contenders:10} {c.rows:5}  {c.scores:14} {c.spread:6.2f}  {c.spreads:18} {told}")
    allowed = 1 - CONFIDENCE
    for name, some in (("equal spreads", [r for r in found if r.cell.spreads == "equal"]), ("all", found)):
        worst = max(some, key=lambda r: r.worst)
        above = [r for r in some if r.worst > allowed + 3 * error(allowed, r.worlds)]
        print(
            f"{name}: {len(above)} of {len(some)} cells above 5 % by more than three errors; the worst has {100 * worst.worst:.2f} %"
        )
    if arguments.worlds is None:
        OUT.write_text(json.dumps([asdict(r) for r in found], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(OUT)


if __name__ == "__main__":
    main()
