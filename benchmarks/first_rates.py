"""How far the first steps of each method go beside LoRA's, and the first learning rate that follows: the tables of docs/comparing.md.

    python benchmarks/first_rates.py                  # measures (about a minute), then writes results/first-rates.json and the page
    python benchmarks/first_rates.py --page           # the page alone

The second table holds the rule against the rates that the comparisons in results/ chose on validation rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rankfold.compare.selection import choose, contenders
from rankfold.compare.trial_file import read
from rankfold.plan.candidates import Candidate
from rankfold.plan.first_rate import LORA_RATE, distance, measured, rounded
from rankfold.runfile.methods import config_class

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "first-rates.json", HERE.parent / "docs" / "comparing.md"
BEGIN, END = "<!-- benchmarks/first_rates.py -->", "<!-- end -->"
ALPHA = {"lora_alpha": 16}
#: What the table calls it, as `plan` reads it, and what its first steps move.
METHODS: list[tuple[str, str, dict[str, Any], str]] = [
    ("LoRA, r = 8", "lora", {"r": 8, **ALPHA}, "B, at α/r = 2"),
    ("LoRA, r = 1", "lora", {"r": 1, **ALPHA}, "B, at α/r = 16"),
    ("LoRA, r = 1, α = 2", "lora", {"r": 1, "lora_alpha": 2}, "B, at α/r = 2"),
    ("rsLoRA, r = 8", "lora", {"r": 8, **ALPHA, "use_rslora": True}, "B, at α/√r = 5.66"),
    ("DoRA (PEFT), r = 8", "peft:dora", {"r": 8, **ALPHA}, "B and the magnitudes, at α/r = 2"),
    ("RaSA, r = 8, k = 1", "rasa", {"r": 8, "shared_rank": 1, **ALPHA}, "B̃ at ½α/(r−k), and B_S at ½α/(Lk)"),
    ("RaSA, r = 1, k = 1", "rasa", {"r": 1, "shared_rank": 1, **ALPHA}, "B_S of all layers, at α/(Lk)"),
    ("SoRA, r = 8", "sora", {"r": 8, **ALPHA}, "B, at α/r times gates of N(0, 1)"),
    ("AdaLoRA, r = 12 to 8", "adalora", {"r": 12, "target_r": 8, **ALPHA}, "Λ alone: P and Q start at N(0, 0.02²)"),
    ("dynamic DoRA, r = 12 to 8", "dynamic_dora", {"r": 12, "target_r": 8, **ALPHA}, "c alone; A and B start as Kaiming"),
    ("CoRA 1, r = 8", "cora", {"r": 8, "approach": 1, **ALPHA}, "A, behind an orthonormal B"),
    ("CoRA 2, r = 8", "cora", {"r": 8, "approach": 2, **ALPHA}, "A, behind an orthonormal B"),
    ("SBoRA-FA, r = 8", "sbora", {"r": 8, **ALPHA}, "B, beside one-hot rows"),
    ("Block-LoRA, r = 8", "block_lora", {"r": 8, **ALPHA}, "the blocks of B, which share A"),
    ("SD-LoRA, r = 8", "sd_lora", {"r": 8}, "B at scale 1, and its magnitude; α is not used"),
    ("COLA, r = 8", "cola", {"r": 8, **ALPHA}, "B of a link"),
    ("RAC-LoRA, r = 8", "rac_lora", {"r": 8, **ALPHA}, "the trained factor of a link, beside a sketch"),
    ("XGBLoRA, r = 1, α = 1", "xgblora", {"r": 1, "lora_alpha": 1}, "b of a booster, all layers drawn"),
    ("Delta-LoRA, r = 8", "delta_lora", {"r": 8, **ALPHA}, "B, 1 + λ = 3 times, as behind the snapshot"),
    ("VeRA (PEFT), r = 256", "peft:vera", {"r": 256}, "b alone, over frozen random factors"),
    ("LoHa (PEFT), r = 8", "peft:loha", {"r": 8, "alpha": 16}, "one of four factors"),
]  # fmt: skip
OPTIMIZERS = ("lora_plus", "lora_pro", "lora_rite", "lora_fa", "riemannian")
#: Comparison, layers of its model, and what LoRA's best rate there was (validation of seed 0).
CHECKED = {"classification": (6, "film reviews, all-MiniLM-L6-v2"), "phonemes": (30, "phonemes, SmolLM2-135M")}
#: A probe at the budget of LoRA r = 1 on the phonemes (120 steps of 16, one seed; test loss .619, .541, .604, .669 for LoRA at 1e-3, 2e-3, 5e-3, 1e-2, and
#: .906, .750, .619, .563, .556 for RaSA at 1e-3 to 2e-2), from LoRA's best rate at r = 8 there.
PROBE = [("LoRA, r = 1", {"name": "lora", "r": 1}, 2e-3, None), ("RaSA, r = 1, k = 1", {"name": "rasa", "r": 1, "shared_rank": 1}, 2e-2, "highest")]  # fmt: skip
DEPTHS = (6, 30)


def config(name: str, fields: dict[str, Any]) -> Any:
    return Candidate(name, *_named(name, fields)).config(_NOTHING, None, ["linear"])


def _named(name: str, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    from rankfold.runfile.peft_methods import ALIASES

    known, given = ALIASES.get(name, (name, {}))
    return known, {**given, **fields}


_NOTHING: Any = None  # a task with a new head would look at the model; there is none here


def measure() -> dict[str, Any]:
    rows = []
    for label, name, fields, moves in METHODS:
        made = config(name, fields)
        rows.append({"label": label, "moves": moves, "layers": {}})
        for layers in DEPTHS:
            lora = distance(config("lora", {"r": 8, **ALPHA}), LORA_RATE, layers, "adamw_torch", {})
            own = distance(made, LORA_RATE, layers, "adamw_torch", {})
            rate = measured(made, LORA_RATE, layers, "adamw_torch", {})
            rows[-1]["layers"][str(layers)] = {"distance": own / lora, "rate": rate}
        print(rows[-1])
    lora = config("lora", {"r": 8, **ALPHA})
    optimizers = {name: measured(lora, LORA_RATE, 6, name, {}) for name in OPTIMIZERS}
    return {"lora_rate": LORA_RATE, "methods": rows, "optimizers": optimizers, "checked": check()}


def check() -> list[dict[str, Any]]:
    """The rule against what comparisons chose: from LoRA's best rate, the others' follow."""
    found = []
    for name, (layers, title) in CHECKED.items():
        chosen = {}
        for group in contenders(read(HERE / "results" / f"evidence-{name}.jsonl")):
            line = next(iter(next(iter(group.ended.values())).values()))
            chosen[group.label] = (line, choose(group, line.greater_is_better))
        lora = chosen["LoRA (PEFT)"][1].best
        for label, (line, sensitivity) in chosen.items():
            fields = {k: v for k, v in line.config.items() if k not in ("target_modules", "basis", "basis_hash")}
            if not line.method.startswith("peft:") or "r" in config_class(line.method).__dataclass_fields__:
                fields.setdefault("r", 8)
            rate = measured(config(line.method, fields), lora, layers, "adamw_torch", {})
            found.append(
                {"task": title, "label": label, "best": sensitivity.best, "edge": sensitivity.edge, "rate": rate}
            )
            print(found[-1])
    lora, (layers, title) = 5e-3, CHECKED["phonemes"]
    for label, fields, best, edge in PROBE:
        made = config(fields["name"], {**{k: v for k, v in fields.items() if k != "name"}, **ALPHA})
        rate = measured(made, lora, layers, "adamw_torch", {})
        found.append({"task": f"{title}, a probe", "label": label, "best": best, "edge": edge, "rate": rate})
    return found


def page(found: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {row['label']} | {row['moves']} | "
        + " | ".join(f"{row['layers'][str(n)]['distance']:.2g}×" for n in DEPTHS)
        + " | "
        + " | ".join(
            f"{row['layers'][str(n)]['rate']:.2g} → {rounded(row['layers'][str(n)]['rate']):g}" for n in DEPTHS
        )
        + " |"
        for row in found["methods"]
    )
    optimizers = ", ".join(f"{name} {rate:.2g}" for name, rate in found["optimizers"].items())
    edge = {None: "", "lowest": " or less", "highest": " or more", "only": ""}
    checked = "\n".join(
        f"| {row['task']} | {row['label']} | {row['rate']:.2g} | {row['best']:g}{edge[row['edge']]} | {_off(row)} |"
        for row in found["checked"]
        if row["label"] != "LoRA (PEFT)"
    )
    return f"""{BEGIN}
| method, α = 16 | what its first steps move | twenty steps go, L = {DEPTHS[0]} | L = {DEPTHS[1]} | first rate, L = {DEPTHS[0]} | L = {DEPTHS[1]} |
|---|---|---|---|---|---|
{rows}

*Twenty steps go*: ‖ΔW‖ after twenty steps at {found["lora_rate"]:g}, over LoRA's with r = 8. L: layers that share a pool. With LoRA, r = 8 and L = {DEPTHS[0]}, the optimisers begin at:
{optimizers}.

The rule against the comparisons in `benchmarks/results/`, from LoRA's best rate in each (validation of seed 0; "or more": the highest rate tried, "or less": the lowest):

| task | method | the rule says | best rate tried | off by |
|---|---|---|---|---|
{checked}
{END}"""


def _off(row: dict[str, Any]) -> str:
    """The factor between rule and observation; nothing is known to be off where the best may lie beyond the edge."""
    ratio = row["rate"] / row["best"]
    if (row["edge"] == "highest" and ratio >= 1) or (row["edge"] == "lowest" and ratio <= 1):
        return "not known: the grid ended"
    return f"{max(ratio, 1 / ratio):.1f}×, {'above' if ratio > 1 else 'below'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--page", action="store_true", help="write the page from what was measured before")
    if not parser.parse_args().page:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + page(json.loads(RESULTS.read_text(encoding="utf-8"))) + after, encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
