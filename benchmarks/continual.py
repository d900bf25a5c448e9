"""SD-LoRA, as its paper and as its code have it, beside plain LoRA that goes on and plain LoRA that begins anew: two new digits per task.

    python benchmarks/continual.py              # runs what is missing, then writes results/evidence-continual.json and the page
    python benchmarks/continual.py --page       # the page alone, docs/methods/sd_lora.md, from the committed results
    python benchmarks/continual.py --one        # a single run, to see what one costs

The learning rate of each contender is chosen by the average after the last task on validation rows, with the first seed; every
seed is then run at that rate and measured on test rows. A seed draws the order of the classes, the weights and the order of the rows.
evidence-continual.yaml has the rest. The images are made 56 pixels wide, which is plenty for digits of 8 pixels and a quarter of the work.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from rankfold.continual.file import load
from rankfold.continual.result import ContinualResult
from rankfold.continual.run import continual
from rankfold.io import assets
from rankfold.io.files import whole_folder

HERE = Path(__file__).parent
RESULT = HERE / "results" / "evidence-continual.json"
PAGE = HERE.parent / "docs" / "methods" / "sd_lora.md"
BEGIN, END = (
    "<!-- written by `python benchmarks/continual.py --page` -->\n",
    "<!-- end of what benchmarks/continual.py wrote -->\n",
)
TARGETS = "target_modules: '.*[.](query|value|q_proj|v_proj)'"
CONTENDERS = {
    "SD-LoRA, norm: paper": [f"method={{name: sd_lora, r: 8, norm: paper, {TARGETS}}}"],
    "SD-LoRA, norm: code": [f"method={{name: sd_lora, r: 8, norm: code, {TARGETS}}}"],
    "LoRA, continue": [f"method={{name: lora, r: 8, lora_alpha: 16, {TARGETS}}}", "next_task=continue"],
    "LoRA, fresh": [f"method={{name: lora, r: 8, lora_alpha: 16, {TARGETS}}}", "next_task=fresh"],
}
#: Of these, the four in the middle are tried; where the best is the last one tried, the next as well.
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2)
PIXELS, MODEL = 56, Path("runs", "dinov2-small-56")


def made_model() -> None:
    """The bundled model, whose image processor makes smaller images."""
    if MODEL.exists():
        return
    with whole_folder(MODEL) as folder:
        shutil.copytree(assets.model_path("dinov2-small"), folder, dirs_exist_ok=True)
        settings = folder / "preprocessor_config.json"
        values = json.loads(settings.read_text(encoding="utf-8"))
        values |= {"size": {"shortest_edge": PIXELS}, "crop_size": {"height": PIXELS, "width": PIXELS}}
        settings.write_text(json.dumps(values, indent=2), encoding="utf-8")


def run(name: str, rate: float, seed: int, rows: str) -> ContinualResult:
    made_model()
    out = Path("runs", "evidence-continual", f"{re.sub('[^A-Za-z]+', '-', name)}-{rate:g}-{seed}-{rows}")
    given = [f"training.learning_rate={rate}", f"training.seed={seed}", f"split.seed={seed}", "data.seed=0"]
    changes = [*CONTENDERS[name], *given, f"data.test={rows}", f"output={out}"]
    return continual(load(HERE / "evidence-continual.yaml", changes), command="python benchmarks/continual.py")


def best_rate(name: str) -> tuple[float, dict[float, float]]:
    """The rate with the best average after the last task, and the averages of all that were tried, in their order."""
    tried: dict[float, float] = {}
    low, high = 2, 6
    while True:
        for rate in LADDER[low:high]:
            tried.setdefault(rate, run(name, rate, SEEDS[0], "validation").measures.averages[-1])
        best = max(tried, key=lambda rate: (tried[rate], -rate))  # the smaller of equals
        if best == LADDER[low] and low > 0:
            low -= 1
        elif best == LADDER[high - 1] and high < len(LADDER):
            high += 1
        else:
            return best, dict(sorted(tried.items()))


def measured() -> Iterator[dict[str, Any]]:
    for name in CONTENDERS:
        rate, tried = best_rate(name)
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


def written(lines: list[dict[str, Any]]) -> str:
    """What came out, for the method's page."""
    rows = [
        "| contender | rates tried: average on validation rows | rate | average after the last task | average anytime | forgetting | backward transfer |",
        "|---|---|---|---|---|---|---|",
    ]
    edges = []
    for name in dict.fromkeys(line["contender"] for line in lines):
        mine = [line for line in lines if line["contender"] == name]
        rate, tried = mine[0]["rate"], {float(k): v for k, v in mine[0]["tried"].items()}
        columns = [
            [line["averages"][-1] for line in mine],
            [line["average_anytime"] for line in mine],
            [line["forgettings"][-1] for line in mine],
            [line["backward_transfer"] for line in mine],
        ]
        cells = [f"{statistics.mean(c):.3f} ({', '.join(f'{x:.3f}' for x in c)})".replace("-", "−") for c in columns]
        tries = ", ".join(f"{r:g}: {score:.3f}" for r, score in tried.items())
        rows.append(f"| {name} | {tries} | {rate:g} | {' | '.join(cells)} |")
        if rate in (min(tried), max(tried)):
            edges.append(f"{name}'s is the {'lowest' if rate == min(tried) else 'highest'}")
    edge = f" The best rate may lie outside of what was tried: {', '.join(edges)}.\n" if edges else ""
    file = yaml.safe_load((HERE / "evidence-continual.yaml").read_text(encoding="utf-8"))
    steps, batch = file["training"]["max_steps"], file["training"]["batch_size"]
    return f"""DINOv2-small, two new handwritten digits per task, {steps} steps of {batch} for each of 5 tasks, q and v at r = 8, the loss over the task's own classes, and a
prediction that may be any digit seen so far. Accuracy as mean over seeds (each one), on {file["data"]["max_test"]} test rows per task; chance is 0.1 at the end. The rate is the best on validation rows with the first seed (`benchmarks/continual.py`).
{edge}
{chr(10).join(rows)}
"""


def write_page(lines: list[dict[str, Any]], page: Path) -> None:
    head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(head + BEGIN + written(lines) + END + rest.partition(END)[2], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--page", action="store_true", help="write the page from the results that are there")
    parser.add_argument("--one", action="store_true", help="a single run")
    options = parser.parse_args()
    if options.one:
        print(run("SD-LoRA, norm: code", LADDER[3], SEEDS[0], "validation").matrix)
        return
    if not options.page:
        RESULT.write_text(json.dumps(list(measured()), indent=1) + "\n", encoding="utf-8")
    lines = json.loads(RESULT.read_text(encoding="utf-8"))
    write_page(lines, PAGE)
    print(written(lines))


if __name__ == "__main__":
    main()
