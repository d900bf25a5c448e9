"""SD-LoRA beside plain LoRA that goes on, and plain LoRA that begins anew, on two new digits per task (evidence-continual.yaml).

    python benchmarks/continual.py              # runs what is missing, then writes results/evidence-continual.json and prints the table
    python benchmarks/continual.py --one        # a single run, to see what one costs

The learning rate of each contender is chosen by the average after the last task on validation rows, with the first seed; every
seed is then run at that rate and measured on test rows. A seed draws the order of the classes, the weights and the order of the rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rankfold.continual.file import load
from rankfold.continual.result import ContinualResult
from rankfold.continual.run import continual

HERE = Path(__file__).parent
RESULT = HERE / "results" / "evidence-continual.json"
TARGETS = "target_modules: '.*[.](query|value|q_proj|v_proj)'"
CONTENDERS = {
    "SD-LoRA, own rule": [f"method={{name: sd_lora, r: 8, {TARGETS}}}"],
    "LoRA, continue": [f"method={{name: lora, r: 8, lora_alpha: 16, {TARGETS}}}", "next_task=continue"],
    "LoRA, fresh": [f"method={{name: lora, r: 8, lora_alpha: 16, {TARGETS}}}", "next_task=fresh"],
}
RATES, SEEDS = (5e-4, 2e-3, 8e-3), (0, 1, 2)


def run(name: str, rate: float, seed: int, rows: str) -> ContinualResult:
    out = Path("runs", "evidence-continual", f"{name.replace(', ', '-').replace(' ', '-')}-{rate:g}-{seed}-{rows}")
    given = [f"training.learning_rate={rate}", f"training.seed={seed}", f"split.seed={seed}", "data.seed=0"]
    changes = [*CONTENDERS[name], *given, f"data.test={rows}", f"output={out}"]
    return continual(load(HERE / "evidence-continual.yaml", changes), command="python benchmarks/continual.py")


def measured() -> Iterator[dict[str, Any]]:
    for name in CONTENDERS:
        tried = {rate: run(name, rate, SEEDS[0], "validation").measures.averages[-1] for rate in RATES}
        rate = max(RATES, key=lambda r: (tried[r], -r))  # the smaller of equals
        for seed in SEEDS:
            found = run(name, rate, seed, "test")
            yield {
                "contender": name,
                "rate": rate,
                "tried": tried,
                "seed": seed,
                "matrix": found.matrix,
                **asdict(found.measures),
            }


def table(lines: list[dict[str, Any]]) -> str:
    rows = [
        "| contender | rate | average after the last task | average anytime | forgetting | backward transfer |",
        "|---|---|---|---|---|---|",
    ]
    for name in CONTENDERS:
        mine = [line for line in lines if line["contender"] == name]
        columns = [
            [line["averages"][-1] for line in mine],
            [line["average_anytime"] for line in mine],
            [line["forgettings"][-1] for line in mine],
            [line["backward_transfer"] for line in mine],
        ]
        cells = [f"{statistics.mean(c):.3f} ({', '.join(f'{x:.3f}' for x in c)})" for c in columns]
        rows.append(f"| {name} | {mine[0]['rate']:g} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--one", action="store_true", help="a single run")
    if parser.parse_args().one:
        print(run("SD-LoRA, own rule", RATES[1], SEEDS[0], "validation").matrix)
        return
    lines = list(measured())
    RESULT.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    print(table(lines))


if __name__ == "__main__":
    main()
