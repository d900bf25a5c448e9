"""The methods on real tasks, compared by `rankfold compare`: the numbers of docs/evidence.md.

    python benchmarks/evidence.py            # runs what is missing of evidence-*.yaml (about two hours on 2 cores), then writes the page
    python benchmarks/evidence.py --page     # the page alone, from the committed lines in results/

CoRA's basis must be there first; the compare files say how it is made.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import yaml

from rankfold.compare import wording
from rankfold.compare.analysis import Analysis
from rankfold.compare.experiment import compare
from rankfold.compare.file import load
from rankfold.compare.statistics import analyse
from rankfold.compare.trial_file import read

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE.parent / "docs" / "evidence.md"
#: File and heading, in the page's order.
TASKS = {
    "classification": "all-MiniLM-L6-v2 learns the sentiment of film reviews",
    "phonemes": "SmolLM2-135M learns to read words aloud",
    "optimisers": "Optimisers for pairs of factors: all-MiniLM-L6-v2 and the film reviews again",
    "capacity-1": "Where capacity matters: reading words aloud at the budget of LoRA r = 1",
    "capacity-2": "Where capacity matters: reading words aloud at the budget of LoRA r = 2",
    "capacity-8": "Where capacity matters: reading words aloud at the budget of LoRA r = 8",
}
#: About four hours each on 2 cores, so they run by `--only` alone; the page says where one has not been run.
LONG = ("capacity-1", "capacity-2", "capacity-8")
EARLIER = RESULTS / "evidence.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--page", action="store_true", help="write the page from the lines that are there")
    parser.add_argument("--only", choices=TASKS, help="run this one alone")
    arguments = parser.parse_args()
    tasks = [arguments.only] if arguments.only else [name for name in TASKS if name not in LONG]
    for name in tasks if not arguments.page else []:
        file = load(HERE / f"evidence-{name}.yaml")
        out = compare(file, workers=2, command=f"rankfold compare benchmarks/evidence-{name}.yaml --workers 2")
        shutil.copyfile(out / "trials.jsonl", RESULTS / f"evidence-{name}.jsonl")
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


def page() -> str:
    parts = [
        "# Evidence: the methods on real tasks\n\nWritten by `python benchmarks/evidence.py --page` from the lines in `benchmarks/results/`; nothing here "
        "is typed by hand. How the intervals are made: [statistics](statistics.md).\n"
    ]
    for name, title in TASKS.items():
        path = RESULTS / f"evidence-{name}.jsonl"
        if path.exists():
            parts.append(section(name, title, path))
        elif name in LONG:
            parts.append(not_run(name, title))
    return "\n".join([*parts, earlier()])


def section(name: str, title: str, path: Path) -> str:
    lines = read(path)
    found = analyse(lines)
    # Not load(), which would ask for CoRA's basis, and the page needs the committed lines alone
    file: dict[str, Any] = yaml.safe_load((HERE / f"evidence-{name}.yaml").read_text(encoding="utf-8"))
    steps, batch = file["training"]["max_steps"], file["training"]["batch_size"]
    seeds, search = (", ".join(f"{x:g}" for x in file[key]) for key in ("seeds", "search_seeds"))
    rates = rates_tried(file, found)
    versions = ", ".join(f"{k} {v}" for k, v in next(line.versions for line in lines if line.versions).items())
    return f"""## {title}

`rankfold compare benchmarks/evidence-{name}.yaml`: {steps} steps of {batch}, budget {file["budget"]:,} trained parameters, learning rates {rates} (chosen on validation rows, with
seed {search}), seeds {seeds}. {len(lines)} trials, {len(found.failures)} of them failed or diverged.

{wording.answer(found)}

{table(found)}

{errors(name)}{"".join(f"* {warning}{chr(10)}" for warning in found.warnings)}
*Trained*: parameters of the adapter that the optimiser changes. *Kept*: Σ rank·(in + out) of the components left after training, which a served LoRA without padding
needs. Made with {versions}.
"""


def table(found: Analysis) -> str:
    n = wording.digits(found)
    rows = [f"| contender | rate | test {wording.words(found.metric)} | 95 % interval | each seed | trained | kept | against {found.reference} |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for c in found.ranked:
        each = ", ".join(wording.number(t, n) for t in c.tests)
        numbers = [f"{x:,.0f}" if x is not None else "–" for x in (c.trained, c.kept)]
        rows.append(
            f"| {c.name} | {c.rate:g} | {wording.number(c.test, n)} | {wording.between(c.interval, n)} | {each} | {numbers[0]} | {numbers[1]} | {wording.against(found, c)} |"
        )
    return "\n".join(rows)


def rates_tried(file: dict[str, Any], found: Analysis) -> str:
    """The grid of all contenders, or each one's where they have their own or found them."""
    own = {m["label"]: ", ".join(f"{x:g}" for x in m["rates"]) for m in file["methods"] if "rates" in m}
    if not isinstance(file["rates"], list):
        own = {c.name: wording.grid(c.sensitivity) for c in found.contenders}
    return "; ".join(f"{label} {tried}" for label, tried in own.items()) or ", ".join(f"{x:g}" for x in file["rates"])


def errors(name: str) -> str:
    """Phoneme error beside loss and token accuracy, on the same words; nothing where they have not been measured."""
    path = RESULTS / f"evidence-{name}-errors.jsonl"
    if not path.exists():
        return ""
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [f"On {lines[0]['words']:,} test words (`benchmarks/phoneme_errors.py`), mean over seeds; the phonemes are decoded greedily:\n", "| contender | seeds | phoneme error | each seed | loss | token accuracy |", "|---|---|---|---|---|---|"]  # fmt: skip
    means = {
        label: [line for line in lines if line["label"] == label] for label in dict.fromkeys(t["label"] for t in lines)
    }
    for label, some in sorted(means.items(), key=lambda pair: statistics.mean(t["phoneme_error"] for t in pair[1])):
        error, loss, right = (
            statistics.mean(t[key] for t in some) for key in ("phoneme_error", "loss", "token_accuracy")
        )
        each = ", ".join(f"{t['phoneme_error']:.4f}" for t in some)
        rows.append(f"| {label} | {len(some)} | {error:.4f} | {each} | {loss:.4f} | {right:.4f} |")
    return "\n".join(rows) + "\n\n"


def not_run(name: str, title: str) -> str:
    file: dict[str, Any] = yaml.safe_load((HERE / f"evidence-{name}.yaml").read_text(encoding="utf-8"))
    methods, steps, batch = len(file["methods"]), file["training"]["max_steps"], file["training"]["batch_size"]
    more = len(file["seeds"]) - len(file["search_seeds"])
    least, most = methods * (3 * len(file["search_seeds"]) + more), methods * (6 * len(file["search_seeds"]) + more)
    return f"""## {title}

**Not run yet.** `rankfold compare benchmarks/evidence-{name}.yaml --workers 2` runs {methods} contenders at a budget of {file["budget"]:,} trained parameters, {steps} steps of {batch}
each: {least} to {most} trials, by how far `rates: auto` has to go. A trial of 50 such steps took 190 s on one core (`results/evidence-phonemes.jsonl`), half of it in steps; at about 400 s per trial,
expect {least * 400 / 2 / 3600:.0f} to {most * 400 / 2 / 3600:.0f} hours on two cores, in as many pieces as you like. Then `benchmarks/phoneme_errors.py {name.rpartition("-")[2]}` adds the phoneme error.
"""


def earlier() -> str:
    """The runs from before `compare` was there: one learning rate for all."""
    found: list[dict[str, Any]] = [json.loads(line) for line in EARLIER.read_text(encoding="utf-8").splitlines()]
    rows = []
    for name in dict.fromkeys(t["name"] for t in found):
        runs = sorted((t for t in found if t["name"] == name), key=lambda t: t["seed"])
        test, ranks = [t["test"] for t in runs], [r for t in runs for r in t["ranks"]]
        rows.append(
            f"| {name} | {statistics.mean(test):.4f} ± {statistics.stdev(test):.4f} | {', '.join(f'{t:.4f}' for t in test)} "
            f"| {runs[0]['trained']:,} | {statistics.mean(t['kept'] for t in runs):,.0f} | {min(ranks)}–{max(ranks)} |"
        )
    return f"""## An earlier run: one learning rate for all

Film reviews again, {found[0]["steps"]} steps of 16 on 3,200 rows, adapters on every linear layer, α/r = 2, learning rate {found[0]["rate"]:g} for all: no method was tuned, and the rule by
which AdaLoRA and dynamic DoRA choose their ranks wants other rates. Test accuracy (2,095 rows) for seeds 0, 1, 2.

| method | test accuracy, mean ± s.d. | each seed | trained | kept | rank kept |
|---|---|---|---|---|---|
{chr(10).join(rows)}

No intervals were made for these runs, and nothing was tuned: which method is better does not follow from this table. CoRA's basis comes from four siblings tuned on other tasks (`examples/make_siblings.py`).
"""


if __name__ == "__main__":
    main()
