"""The contenders as they will be trained: on which modules and layers, with the ranks that the budget leaves them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rankfold.compare.file import THIRDS, CompareFile, ContenderSpec, Extension, Place, SameAs, number, with_targets
from rankfold.compare.rates import RateGrid, given
from rankfold.errors import RankfoldError
from rankfold.inspect import grid as layout
from rankfold.plan.first_rate import LAYERS, first_rate, lora_rate_of
from rankfold.plan.match import solve
from rankfold.runfile.checks import peft_config
from rankfold.runfile.methods import config_fields
from rankfold.runfile.optimizers import row_of
from rankfold.tasks.rows import DataError
from rankfold.train import budget, model
from rankfold.train.optimizer import RunOptimizer
from rankfold.train.prepare import Prepared, make_plan, prepare

if TYPE_CHECKING:
    from peft import PeftModel

    from rankfold.runfile.schema import RunFile


@dataclass(frozen=True)
class Entry:
    """A contender on one set of layers.

    Args:
        method: its section of a run file.
        training: what it changes in the run file's section of that name: its optimiser and the options.
        grid: learning rates; None for those of the file.
        trained, head: parameters trained in the adapter, and in full beside it; None if it cannot be built.
        reason: why it cannot be trained, or None.
    """

    label: str
    where: str
    method: dict[str, Any]
    trained: int | None = None
    head: int | None = None
    reason: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    grid: RateGrid | None = None

    def name(self) -> str:
        """The entry in words."""
        return self.label if self.where == "all" else f"{self.label}, {self.where}"


@dataclass(frozen=True)
class Lineup:
    """The contenders, and what they train on.

    Args:
        budget: in trained parameters of the adapter, or None.
        steps: of a whole trial.
        rows: by split.
        digest: of the rows' content.
    """

    entries: list[Entry]
    budget: int | None
    steps: int
    rows: dict[str, int]
    digest: str
    notes: list[str]


def resolve(file: CompareFile) -> Lineup:
    """Chooses the layers and ranks of every contender, from the shapes of the model alone.

    Raises:
        DataError, ModelError: rows or model cannot be used. ValueError: no contender can be trained at this budget.
    """
    prepared = prepare(file.run_file(with_targets(file.methods[0], file.targets), file.a_rate, file.seeds[0], "-"))
    for split, use in (("validation", "chooses the learning rates"), ("test", "is what the report is on")):
        if prepared.rows[split] is None:
            raise DataError(
                f"data.{split}: there are no {split} rows, and their metric {use}; hold some out: {split}: 0.1"
            )
    bench = _Bench(file, prepared)
    limit = bench.limit()
    entries = [bench.entry(*one, limit) for one in bench.all()]
    first = next((e for e in entries if e.reason is None), None)
    if first is None:
        raise RankfoldError("no contender can be trained: " + "; ".join(f"{e.name()}: {e.reason}" for e in entries))
    run = file.run_file(first.method, file.a_rate, file.seeds[0], "-", first.training)
    plan = make_plan(dataclasses.replace(prepared, run=run, peft_config=peft_config(run)))
    same: dict[str, Entry] = {}
    for entry in entries:
        other = same.setdefault(identity(entry.method, entry.training), entry)
        if other is not entry:
            names = f"'{other.name()}' and '{entry.name()}'"
            raise RankfoldError(f"methods: {names} are the same method with the same fields; remove one")
    rows = {split: len(prepared.rows.splits[split]) for split in ("train", "validation", "test")}
    digest = " ".join(prepared.encoded[split].digest()[:12] for split in rows)
    return Lineup(entries, limit, plan.steps, rows, digest, plan.notes)


class _Bench:
    """The model without its weights, to try adapters on."""

    def __init__(self, file: CompareFile, prepared: Prepared):
        self.file, self.prepared = file, prepared
        self.counted: dict[str, budget.Budget] = {}
        self.first_rates: dict[str, float] = {}
        self.skeleton, self.head = model.load_model(prepared.run, prepared.place, prepared.config, weights=False)

    def all(self) -> Iterator[tuple[str, ContenderSpec, str, Place]]:
        for label, contender in zip(self.file.labels(), self.file.methods, strict=True):
            for where, place in self.file.places.items():
                yield label, contender, where, place

    def adapted(self, method: dict[str, Any]) -> PeftModel:
        return model.adapt(deepcopy(self.skeleton), peft_config(self.run(method)), self.head, self.prepared.processor)

    def run(self, method: dict[str, Any], training: dict[str, Any] | None = None) -> RunFile:
        return self.file.run_file(method, self.file.a_rate, self.file.seeds[0], "-", training)

    def count(self, method: dict[str, Any], training: dict[str, Any] | None = None) -> budget.Budget:
        """What the optimiser trains; counted once per method, optimiser and fields."""
        key = identity(method, training or {})
        if key not in self.counted:
            adapted = self.adapted(method)
            RunOptimizer.of(self.run(method, training), adapted)  # refuses and freezes, as in a trial
            self.counted[key] = budget.count(adapted)
        return self.counted[key]

    def limit(self) -> int | None:
        """The budget as a number."""
        if not isinstance(self.file.budget, SameAs):
            return None if self.file.budget is None else number(self.file.budget)
        return budget.count(self.adapted(with_targets(self.file.budget.of, self.file.targets))).adapter

    def entry(self, label: str, contender: ContenderSpec, where: str, place: Place, limit: int | None) -> Entry:
        method = with_targets(contender, self.file.targets)
        rates = contender.rates or self.file.rates
        entry = Entry(label, where, method, training=contender.training, grid=given(rates, self.file.a_rate))
        try:
            method |= self.placed(place, method.get("target_modules"))
            if limit is not None:
                method, trained, head = self.solved(method, limit)
                entry = replace(entry, method=method, trained=trained, head=head)
            # The solver has counted what AdamW trains; others may refuse the adapter, or freeze a part of it
            if limit is None or row_of(self.run(method, contender.training).training.optimizer) is not None:
                spent = self.count(method, contender.training)
                entry = replace(entry, method=method, trained=spent.adapter, head=spent.head)
            if isinstance(rates, Extension) and rates.extend == "auto":
                first = self.first_rate(method, contender.training)
                entry = replace(entry, grid=RateGrid.around(first, rates.most))
        except ValueError as e:
            return replace(entry, method=method, trained=None, head=None, reason=str(e))
        return entry

    def first_rate(self, method: dict[str, Any], training: dict[str, Any]) -> float:
        """Where the search for a learning rate begins; measured once per method, optimiser and fields."""
        run, key = self.run(method, training), identity(method, training)
        if key not in self.first_rates:
            text = self.prepared.config.get_text_config()
            self.first_rates[key] = first_rate(
                peft_config(run),
                lora_rate=lora_rate_of(self.file.task),
                layers=getattr(text, "num_hidden_layers", None) or LAYERS,
                optimizer=run.training.optimizer,
                options=run.training.optimizer_options,
            )
        return self.first_rates[key]

    def solved(self, method: dict[str, Any], limit: int) -> tuple[dict[str, Any], int, int]:
        """The method with the fields that the budget changes, and what AdamW trains in the adapter and in full beside it."""
        config = peft_config(self.run(method))
        if self.prepared.task.new_head:
            model.keep(config, self.head)
        found = solve(self.skeleton, config, limit)
        before, after = dataclasses.asdict(config), dataclasses.asdict(found.config)
        known = config_fields(type(config))
        changed = {key: _plain(after[key]) for key in known if _plain(after[key]) != _plain(before[key])}
        return method | changed, found.trained, found.head

    def placed(self, place: Place, targets: Any) -> dict[str, Any]:
        targets = targets if place.target_modules is None else place.target_modules
        fields = {} if place.target_modules is None else {"target_modules": targets}
        if place.layers is None:
            return fields
        if isinstance(targets, str) and targets.lower() != "all-linear":
            raise RankfoldError(f"where: layers cannot be chosen beside the regex '{targets}'; list the modules' names")
        # PEFT counts layers only where the names of the modules are listed.
        names = self.linear if isinstance(targets, str) else targets
        return {"target_modules": names, "layers_to_transform": self.layers(place.layers)}

    @cached_property
    def linear(self) -> list[str]:
        """The last names of what all-linear stands for."""
        adapted = self.adapted({"name": "peft:lora", "r": 1, "target_modules": "all-linear"})
        names: list[str] = adapted.base_model.targeted_module_names  # pyright: ignore[reportAssignmentType]
        return sorted({name.rpartition(".")[2] for name in names})

    def layers(self, wanted: str | list[int]) -> list[int]:
        count = getattr(self.prepared.config.get_text_config(), "num_hidden_layers", None)
        if count is None:
            raise RankfoldError("where: layers: the model's config does not say how many layers it has")
        numbered = {layer for name, _ in self.skeleton.named_modules() if (layer := layout.place(name)[1]) is not None}
        if not numbered.issuperset(range(count)):
            raise RankfoldError(f"where: layers: the {count} layers of the model share modules; none can be chosen")
        if isinstance(wanted, str):
            part = THIRDS.index(wanted)
            found = list(range(round(part * count / 3), round((part + 1) * count / 3)))
            if not found:  # to PEFT no layer means all of them
                raise RankfoldError(f"where: layers: of {count} layers the {wanted} is empty; give their numbers")
            return found
        if outside := [layer for layer in wanted if not 0 <= layer < count]:
            raise RankfoldError(f"where: layers: {outside[0]} is not a layer; the model has layers 0 to {count - 1}")
        return wanted


def identity(method: dict[str, Any], training: dict[str, Any]) -> str:
    """What tells contenders apart, whatever they are called."""
    return json.dumps([method, training], sort_keys=True, default=str)


def _plain(value: Any) -> Any:
    """As a run file holds it."""
    return sorted(value) if isinstance(value, set) else value
