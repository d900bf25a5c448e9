"""The methods on real tasks, compared by `rankfold compare`: docs/evidence.md, and "Measured" on the page of each method and optimiser.

    python benchmarks/evidence.py            # runs what is missing of evidence-*.yaml (hours on 2 cores), then writes the pages
    python benchmarks/evidence.py --page     # the pages alone, from the committed lines in results/

CoRA's basis must be there first; the compare files say how it is made.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from rankfold.compare import wording
from rankfold.compare.analysis import Analysis, Contender
from rankfold.compare.experiment import compare
from rankfold.compare.file import load
from rankfold.compare.statistics import analyse
from rankfold.compare.trial_file import TrialLine, read

HERE = Path(__file__).parent
RESULTS, DOCS = HERE / "results", HERE.parent / "docs"
#: File and heading, in the page's order.
TASKS = {
    "classification": "all-MiniLM-L6-v2 learns the sentiment of film reviews",
    "phonemes": "SmolLM2-135M learns to read words aloud",
    "optimisers": "Optimisers for pairs of factors: all-MiniLM-L6-v2 and the film reviews again",
    "chains": "Chains beside LoRA: all-MiniLM-L6-v2 and the film reviews again",
    "structures": "Few examples: all-MiniLM-L6-v2 and 160 film reviews",
    "vowels": "Rank 1: all-MiniLM-L6-v2 and the first vowel of a spelt word",
    "capacity-1": "Does rank matter? Reading words aloud at the budget of LoRA r = 1",
    "capacity-2": "Does rank matter? Reading words aloud at the budget of LoRA r = 2",
    "capacity-8": "Does rank matter? Reading words aloud at the budget of LoRA r = 8",
}
#: The budgets of one task, which `across` puts beside each other: what LoRA has there as r.
BUDGETS = {"capacity-1": 1, "capacity-2": 2, "capacity-8": 8}
#: What is written on the page of a method or an optimiser lies between these; a page without them stays as it is.
BEGIN, END = "<!-- measured: written by `python benchmarks/evidence.py --page` -->\n", "<!-- end of measured -->\n"
EARLIER = RESULTS / "evidence.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--page", action="store_true", help="write the page from the lines that are there")
    parser.add_argument("--only", choices=TASKS, help="run this one alone")
    arguments = parser.parse_args()
    tasks = [arguments.only] if arguments.only else list(TASKS)
    for name in tasks if not arguments.page else []:
        file = load(HERE / f"evidence-{name}.yaml")
        out = compare(file, workers=2, command=f"rankfold compare benchmarks/evidence-{name}.yaml --workers 2")
        shutil.copyfile(out / "trials.jsonl", RESULTS / f"evidence-{name}.jsonl")
    for path in write(RESULTS, DOCS):
        print(path)


def write(results: Path, docs: Path) -> list[Path]:
    """Writes the pages of `docs` from the lines in `results`; returns those that were written."""
    analyses = analysed(results)
    written = [docs / "evidence.md"]
    written[0].write_text(page(results, analyses), encoding="utf-8")
    for path in sorted([*docs.glob("methods/*.md"), *docs.glob("optimisers/*.md")]):
        text = path.read_text(encoding="utf-8")
        if BEGIN in text and (found := measured(analyses, path)):
            head, _, rest = text.partition(BEGIN)
            path.write_text(head + BEGIN + found + "\n" + END + rest.partition(END)[2], encoding="utf-8")
            written.append(path)
    return written


def analysed(results: Path) -> dict[str, Analysis]:
    """Of each comparison that has lines, by its name."""
    found = {name: read(path) for name in TASKS if (path := results / f"evidence-{name}.jsonl").exists()}
    return {name: analyse(lines) for name, lines in found.items() if lines}


def page(results: Path, analyses: dict[str, Analysis]) -> str:
    parts = [
        "# Evidence: the methods on real tasks\n\nWritten by `python benchmarks/evidence.py --page` from the lines in `benchmarks/results/`; nothing here "
        "is typed by hand. How the intervals are made: [statistics](statistics.md).\n",
        in_short(analyses),
    ]
    for name, found in analyses.items():
        parts.append(section(name, found, read(results / f"evidence-{name}.jsonl")))
    parts.append(across(analyses))
    return "\n".join([*parts, earlier()])


def in_short(analyses: dict[str, Analysis]) -> str:
    """What was shown at all: how each comparison's contenders stand to its reference, counted."""
    rows, total = [], Counter[str]()
    for name, found in analyses.items():
        held = {c.name: d for c in found.ranked if (d := found.difference(c.name, found.reference or ""))}
        named = [
            ", ".join(label for label, d in held.items() if d.verdict == verdict) or "–"
            for verdict in ("better", "worse")
        ]
        counted = Counter(d.verdict for d in held.values())
        total += counted
        open_, seeds = counted["no difference shown"], max((len(c.tests) for c in found.ranked), default=0)
        rows.append(
            f"| {TASKS[name]} | {found.reference} | {seeds} | {len(held)} | {named[0]} | {named[1]} | {open_} |"
        )
    return f"""## In short

{total.total()} contenders were held against the reference of their comparison, each at its best learning rate: {total["better"]} are shown to be better, {total["worse"]} worse. For {total["no difference shown"]} no
difference is shown, which is not the same as none: with three seeds the intervals are wide. For {total["not tested"]} there were too few seeds to tell.

| comparison | reference | seeds | contenders | better | worse | no difference shown |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}
"""


def settings(name: str) -> dict[str, Any]:
    """The compare file. Not load(), which would ask for CoRA's basis, and the pages need the committed lines alone."""
    return yaml.safe_load((HERE / f"evidence-{name}.yaml").read_text(encoding="utf-8"))


def section(name: str, found: Analysis, lines: list[TrialLine]) -> str:
    file = settings(name)
    steps, batch = file["training"]["max_steps"], file["training"]["batch_size"]
    seeds = ", ".join(map(str, sorted({line.seed for line in lines})))
    search = ", ".join(map(str, file["search_seeds"]))
    more = "".join(f", then `benchmarks/{path.name}`" for path in sorted(HERE.glob(f"evidence-{name}-*.yaml")))
    rates = rates_tried(file)
    versions = ", ".join(f"{k} {v}" for k, v in next(line.versions for line in lines if line.versions).items())
    budget = file.get("budget")
    size = (
        f"budget {budget:,} trained parameters"
        if isinstance(budget, int)
        else "each contender at the rank that it is given"
    )
    return f"""## {TASKS[name]}

`rankfold compare benchmarks/evidence-{name}.yaml`{more}: {steps} steps of {batch}, {size}, learning rates {rates} (chosen on validation rows, with
seed {search}), seeds {seeds}. {len(lines)} trials, {len(found.failures)} of them failed or diverged.

{wording.answer(found)}

{table(found)}

{errors(name)}{"".join(f"* {warning}{chr(10)}" for warning in found.warnings)}
*Trained*: parameters of the adapter that the optimiser changes. *Kept*: Σ rank·(in + out) of the components left after training, which a served LoRA without padding
needs. Made with {versions}.
"""


def table(found: Analysis) -> str:
    n = wording.digits(found)
    rows = [f"| contender | rate, of those tried | test {wording.words(found.metric)} | 95 % interval | each seed | trained | kept | against {found.reference} |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for c in found.ranked:
        each = ", ".join(wording.number(t, n) for t in c.tests)
        numbers = [wording.count(x) for x in (c.trained, c.kept)]
        tried = ", ".join(f"{p.rate:g}" for p in c.sensitivity.points)
        rows.append(
            f"| {c.name} | {c.rate:g} of {tried} | {spread(found, c)} | {wording.between(c.interval, n)} | {each} | {numbers[0]} | {numbers[1]} | {against(found, c, found.reference)} |"
        )
    return "\n".join(rows)


def measured(analyses: dict[str, Analysis], path: Path) -> str:
    """What came out for the method or optimiser that `path` is the page of, beside each plain LoRA; "" where it took no part."""
    rows = []
    for name, found in analyses.items():
        plain = [
            c
            for c in found.ranked
            if page_of(c) == ("methods", "lora") and not {"use_dora", "use_rslora"} & {*c.config}
        ]
        plain.sort(key=lambda c: c.name != found.reference)
        own = [c for c in found.ranked if page_of(c) == (path.parent.name, path.stem) != ("methods", "lora")]
        about = f"{TASKS[name]}: {wording.words(found.metric)}, {settings(name)['training']['max_steps']} steps"
        for c in own:
            edge = c.sensitivity.edge if c.sensitivity.edge in ("lowest", "highest") else None
            rate = f"{c.rate:g}" + (f" ({edge} tried)" if edge else "")
            for other in plain:
                rows.append(
                    f"| {about} | {c.name} | {wording.count(c.trained)} | {wording.count(c.kept)} | {rate} | {spread(found, c)} | {other.name} | "
                    f"{spread(found, other)} | {against(found, c, other.name)} |"
                )
    if not rows:
        return ""
    return f"""The mean over the seeds ± their standard deviation, on test rows, at the best learning rate of each on validation rows. Where that is the lowest or highest one that was tried, a better one may lie
outside. *Kept* is what a plain LoRA of the components left after training has. Differences have a 95 % interval that holds for all contenders of a comparison together ([all of them, with the settings](../evidence.md)).

| task | contender | trained | kept | rate | test | beside | its test | difference |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}"""


def page_of(c: Contender) -> tuple[str, str]:
    """Folder and name of the page of a contender: its optimiser's where it has one of its own, else its method's."""
    optimizer = c.training.get("optimizer")
    return ("optimisers", optimizer) if optimizer else ("methods", c.method.removeprefix("peft:"))


def spread(found: Analysis, c: Contender) -> str:
    """The mean over the seeds and their standard deviation, and how many did not finish."""
    n = wording.digits(found)
    deviation = "" if c.deviation is None else f" ± {wording.number(c.deviation, n)}"
    return wording.number(c.test, n) + deviation + (f", {len(c.failed)} of the seeds failed" if c.failed else "")


def against(found: Analysis, c: Contender, other: str | None) -> str:
    """As `wording.against` of any other contender, with the interval."""
    n, d = wording.digits(found), found.difference(c.name, other) if other and other != c.name else None
    if d is None:
        return "reference" if c.name == other else wording.NOTHING
    interval = f" ({wording.between(d.interval, n, sign=True)})" if d.interval else ""
    return f"{wording.signed(d.value, n)}{interval}, {d.verdict}"


def rates_tried(file: dict[str, Any]) -> str:
    """The grid of all contenders, and those of the contenders that have their own."""
    if not isinstance(file["rates"], list):
        return "of each contender's own, with more until the best lies inside"
    own = [f"{m['label']} {', '.join(f'{x:g}' for x in m['rates'])}" for m in file["methods"] if "rates" in m]
    shared = ", ".join(f"{x:g}" for x in file["rates"])
    if not own:
        return shared
    return "; ".join(own if len(own) == len(file["methods"]) else [*own, f"the others {shared}"])


def errors(name: str) -> str:
    """Phoneme error beside loss and token accuracy, on the same words; nothing where they have not been measured."""
    path = RESULTS / f"evidence-{name}-errors.jsonl"
    if not path.exists():
        return ""
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [f"On {lines[0]['words']:,} test words, mean over seeds; the phonemes are decoded greedily. Loss: of the true phonemes on the same words. Token accuracy: the trials' own, on their test rows. *Reviews*: the loss on film reviews, plain English that no run has trained on; what it rises above the model's own is forgotten (`benchmarks/phoneme_errors.py`).\n", "| contender | seeds | phoneme error | each seed | loss | token accuracy | reviews |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    means = {
        label: [line for line in lines if line["label"] == label] for label in dict.fromkeys(t["label"] for t in lines)
    }
    for label, some in sorted(means.items(), key=lambda pair: statistics.mean(t["phoneme_error"] for t in pair[1])):
        error, loss, right, reviews = (
            statistics.mean(t[key] for t in some) for key in ("phoneme_error", "loss", "token_accuracy", "reviews_loss")
        )
        each = ", ".join(f"{t['phoneme_error']:.4f}" for t in some)
        seeds = "–" if some[0]["seed"] is None else len(some)
        rows.append(f"| {label} | {seeds} | {error:.4f} | {each} | {loss:.4f} | {right:.4f} | {reviews:.4f} |")
    return "\n".join(rows) + "\n\n"


def across(analyses: dict[str, Analysis]) -> str:
    """Contenders of the same name at each budget: whether the task wants more rank at all; "" where there is one budget."""
    found = {r: analyses[name] for name, r in BUDGETS.items() if name in analyses}
    if len(found) < 2:
        return ""
    rows = []
    for label in dict.fromkeys(c.name for analysis in found.values() for c in analysis.ranked):
        at = [next((c for c in analysis.ranked if c.name == label), None) for analysis in found.values()]
        cells = [spread(analysis, c) if c else "–" for analysis, c in zip(found.values(), at, strict=True)]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return f"""## Does this task want more rank?

Test {wording.words(next(iter(found.values())).metric)} of the comparisons above, each contender at its best rate. The budget is the parameters of LoRA at this r.

| contender | {" | ".join(f"r = {r}" for r in found)} |
|---|{"---|" * len(found)}
{chr(10).join(rows)}
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
