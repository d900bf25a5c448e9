"""A commented compare file to start from; it works offline with the bundled model and data."""

from __future__ import annotations

from rankfold.host import registry
from rankfold.tasks import table

_REST = """\

# Who competes. A name, or {name, label, fields of its config}; names as in `rankfold methods`, or peft:NAME.
methods:
  - {name: peft:lora, label: LoRA, lora_alpha: 16}
%s
# The most parameters that an adapter may train; ranks follow from it. 1200000, 1.2M, {of: {name: ..., fields}}, or none.
# LoRA trains %s at r = 8. A little above that, so that a method's few gates do not cost it a whole rank.
budget: %s

# Which modules, for contenders that do not name their own.
targets: all-linear

# Every contender on several sets of layers, each at the same budget.
# where:
#   first: {layers: first third}            # or middle third, last third, [0, 1, 5]
#   last: {layers: last third}
#   attention: {target_modules: [query, key, value]}

# Learning rates to try. Validation chooses; test is only reported. auto begins at a first rate for each method and scale, and adds
# rates until the best one lies inside. Or a list for every contender, or for one: {name: ..., rates: [1e-3, 2e-3, 5e-3]}.
rates: auto
seeds: [0, 1, 2]                            # at least three: with fewer, no difference can be shown

# grid runs every rate with every seed. Cheaper:
# search_seeds: [0]                         # choose the rate with these seeds, run the others at that rate alone
# search: {halving: {keep: 0.5, rungs: 3}}  # after a quarter and a half of the steps the better half of the rates goes on
"""


def template(task: str = "classification") -> str:
    """The text of a compare file for a task."""
    beginning, *budget = table.get(task).comparison
    starters = [row for row in registry.find() if row.starter]
    methods = "".join(f"  - {{name: {row.name}, label: {row.title}, lora_alpha: 16}}\n" for row in starters)
    return f"""\
# rankfold compare compare.yaml               run what is missing; a killed comparison goes on where it stopped
# rankfold compare compare.yaml --dry-run     contenders, their parameters at the budget, and how many trials
# model, task, data and training are those of a run file: `rankfold init` explains every key.
{beginning}{_REST % (methods, *budget)}"""
