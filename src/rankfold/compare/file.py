"""The compare file: one YAML that says what is compared with what, on which model and data, at which budget.

`model`, `task`, `data` and `training` are those of a run file and the same for every contender; what differs between two
trials is the method, where it is put, the learning rate and the seed. Problems are reported as those of a run file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from rankfold.errors import short
from rankfold.plan.match import parse_budget
from rankfold.runfile.checks import check
from rankfold.runfile.imports import DESCRIPTION as IMPORTS
from rankfold.runfile.imports import load_all, with_places
from rankfold.runfile.load import check_command, overridden, read_values
from rankfold.runfile.methods import config_class, config_fields
from rankfold.runfile.problems import Problem, RunFileError, explain
from rankfold.runfile.schema import Data, Method, Model, RunFile, Section, Seed, TaskName, Training
from rankfold.runfile.yaml import KeyPath, write
from rankfold.tasks import table

THIRDS = ("first third", "middle third", "last third")


class Extension(Section):
    extend: Literal["auto"] | Annotated[list[float], Field(min_length=1)] = Field(
        description="Rates to begin with; auto: a first rate for the method, and its neighbours."
    )
    most: int = Field(default=6, ge=1, description="How many rates may be added, until the best one lies inside.")


Rates = Annotated[list[float], Field(min_length=1)] | Extension


class ContenderSpec(Method):
    """A method as in a run file, and what is its own beside it: optimiser, rates, name in the report."""

    label: str | None = Field(default=None, description="Its name in the report; by default the method's.")
    optimizer: str | None = Field(default=None, description="Its optimiser; by default that of `training`.")
    optimizer_options: dict[str, Any] | None = Field(default=None, description="Options of its optimiser.")
    rates: Rates | None = Field(
        default=None, description="Learning rates to try with it, or auto; by default those of all contenders."
    )

    @property
    def training(self) -> dict[str, Any]:
        """What it changes in the section `training` of its run files."""
        if self.optimizer is None and self.optimizer_options is None:
            return {}
        named = {} if self.optimizer is None else {"optimizer": self.optimizer}
        return {**named, "optimizer_options": self.optimizer_options or {}}

    def called(self) -> str:
        """What it is called where it has no label and no other is called so."""
        return self.name if self.optimizer is None else f"{self.optimizer} on {self.name}"


class Place(Section):
    target_modules: str | list[str] | None = Field(
        default=None, description="Which modules, as in a run file; by default those of `targets`."
    )
    layers: Literal["first third", "middle third", "last third"] | list[int] | None = Field(
        default=None, description="Which layers, counted from 0; by default all."
    )


class Halving(Section):
    keep: float = Field(default=0.5, gt=0, lt=1, description="The share of the rates that goes on after each rung.")
    rungs: int = Field(default=3, gt=1, description="How often the rates are measured, the end included.")


class HalvingSearch(Section):
    halving: Halving = Field(description="Successive halving: after every rung the best rates go on.")


class SameAs(Section):
    of: ContenderSpec = Field(description="A method and its fields, whose trained parameters are the budget.")


class CompareFile(Section):
    """One comparison. Build it with `load` (from a file) or `parse` (from a dictionary)."""

    model: Model = Field(description="The pretrained model, as in a run file.")
    task: TaskName = Field(description="What is learnt, as in a run file.")
    data: Data = Field(description="The rows, as in a run file; validation and test rows are needed.")
    methods: list[ContenderSpec] = Field(min_length=1, description="Who competes: names, or {name, label, fields...}.")
    targets: str | list[str] = Field(
        default="all-linear", description="target_modules of every contender that does not name its own."
    )
    where: dict[str, Place] = Field(
        default={}, description="Named sets of layers; every contender is tried on each, at the same budget."
    )
    budget: int | str | SameAs | None = Field(
        default=None,
        description="Trained parameters of every adapter: 1200000, 1.2M, or {of: {name: peft:lora, r: 8}}; the ranks of "
        "every contender follow. None: as the contenders say.",
    )
    rates: Rates = Field(
        default=Extension(extend="auto"),
        description="Learning rates to try with every contender. auto: a few around a first rate of the method, and more beyond "
        "the best until it has neighbours on both sides; {extend: [1e-3, 2e-3]} begins with these.",
    )
    seeds: list[Seed] = Field(
        min_length=1, description="Seeds of the head, the adapter, the order of rows and dropout."
    )
    search: Literal["grid"] | HalvingSearch = Field(
        default="grid",
        description="grid: every rate to its end. {halving: {keep: 0.5, rungs: 3}}: bad rates end early.",
    )
    search_seeds: list[int] | None = Field(
        default=None,
        min_length=1,
        description="The seeds that choose the rate; the others are run at that rate alone. By default all of them for "
        "the grid, and the first one for halving.",
    )
    training: Training = Field(
        default=Training(),
        description="As in a run file, stopping included; rates and seeds replace two of its keys.",
    )
    launch: str | None = Field(
        default=None, description="What starts a trial on several devices: accelerate launch --num_processes 2."
    )
    imports: list[str] = Field(default=[], description=IMPORTS)
    output: str = Field(description="Folder of the comparison. One that is there is continued.")

    @property
    def a_rate(self) -> float:
        """Any rate, for what does not depend on it."""
        given = self.rates.extend if isinstance(self.rates, Extension) else self.rates
        return given[0] if isinstance(given, list) else 1e-3

    @property
    def choosing_seeds(self) -> list[int]:
        """The seeds whose validation chooses the learning rate."""
        return self.search_seeds or (self.seeds if self.search == "grid" else self.seeds[:1])

    @property
    def rungs(self) -> list[float]:
        """Shares of the steps after which the rates are measured; the last is 1."""
        if isinstance(self.search, str):
            return [1.0]
        h = self.search.halving
        return [h.keep ** (h.rungs - 1 - i) for i in range(h.rungs)]

    @property
    def places(self) -> dict[str, Place]:
        return self.where or {"all": Place()}

    def labels(self) -> list[str]:
        """What each contender is called: as the file says, else the method, with its fields where two have one."""
        names = Counter(c.called() for c in self.methods)

        def told_apart(c: ContenderSpec) -> str:
            fields = {**c.fields, **(c.optimizer_options or {})}
            return " ".join([c.called(), *(f"{k}={v}" for k, v in fields.items())])

        return [c.label or (c.called() if names[c.called()] == 1 else told_apart(c)) for c in self.methods]

    def run_file(
        self, method: dict[str, Any], rate: float, seed: int, output: str, training: Mapping[str, Any] | None = None
    ) -> RunFile:
        """The run file of a trial; `training` is what the contender changes there."""
        shared = self.model_dump(include={"model", "task", "data", "training", "imports"}, exclude_none=True)
        shared["training"] |= {"learning_rate": rate, "seed": seed, **(training or {})}
        return RunFile.model_validate({**shared, "method": method, "output": output})

    def to_yaml(self, comment: str = "") -> str:
        """Every value, defaults included, so that the file means the same in a later version; below a comment."""
        values = self.model_dump(exclude_none=True, exclude={"training": {"learning_rate", "seed"}})
        return write(values, comment)


def load(path: str | Path, overrides: Iterable[str] = ()) -> CompareFile:
    """Read a compare file and apply `key=value` overrides.

    Raises:
        RunFileError: one line for each problem, with its line number. OSError: the file cannot be read.
    """
    values, lines = read_values(Path(path), f"no compare file '{path}': `rankfold init {path} --compare` writes one")
    check_command(values, "compare", path)
    return parse(values, overrides, where=str(path), lines=lines)


def parse(
    values: Any, overrides: Iterable[str] = (), where: str = "compare file", lines: dict[KeyPath, int] | None = None
) -> CompareFile:
    """Check plain values as `load` does.

    Raises:
        RunFileError: one line for each problem.
    """
    lines = dict(lines or {})
    values = with_places(overridden(values, CompareFile, overrides, where, lines), where)
    problems = _short_forms(values)
    if not problems:
        try:
            file = CompareFile.model_validate(values)
        except ValidationError as e:
            problems = explain(e, CompareFile)
        else:
            problems = load_all(file.imports) or _check(file)
            if not problems:
                return file
    raise RunFileError(problems, where, lines)


def _short_forms(values: dict[str, Any]) -> list[Problem]:
    """Expands `methods: [NAME]`, `rates: auto`, `budget: none` and `search: halving`, and fills in what a comparison decides by itself."""
    problems = []
    methods = values.get("methods")
    if isinstance(methods, list):
        values["methods"] = [{"name": m} if isinstance(m, str) else m for m in methods]
        for i, m in enumerate(values["methods"]):
            if not (isinstance(m, dict) and isinstance(m.get("name"), str)):
                problems.append(
                    Problem(("methods", i), f"{short(m)} is neither a method's name nor {{name: ..., ...}}")
                )
    for section in [values, *(m for m in values.get("methods") or () if isinstance(m, dict))]:
        if section.get("rates") == "auto":
            section["rates"] = {"extend": "auto"}
    if values.get("budget") == "none":
        values.pop("budget")
    if values.get("search") == "halving":
        values["search"] = {"halving": {}}
    data, training = values.get("data"), values.get("training", {})
    if isinstance(data, dict):
        values["data"] = {"seed": 0} | data  # the same rows for every seed, so that trials can be paired row by row
    if isinstance(training, dict):
        for key, of in (("learning_rate", "rates"), ("seed", "seeds")):
            if key in training:
                problems.append(Problem(("training", key), f"comes from {of}; remove it here"))
        # The same for scheduled methods, which would keep their last checkpoint, and the others.
        values["training"] = {"keep_best": False} | training
    return problems


@dataclass(frozen=True)
class _Spot:
    """Where in the file a list stands, for the messages about its values."""

    path: KeyPath
    values: list[Any]

    def repeated(self) -> list[Problem]:
        twice = [v for v, n in Counter(map(str, self.values)).items() if n > 1]
        return [Problem(self.path, f"{', '.join(twice)} stands there twice")] if twice else []

    def rates(self) -> list[Problem]:
        wrong = [Problem(self.path, f"{rate:g} must be greater than 0") for rate in self.values if not rate > 0]
        return [*self.repeated(), *wrong]


def _rates(path: KeyPath, given: Rates | None) -> list[Problem]:
    if isinstance(given, Extension):
        return _rates((*path, "extend"), given.extend if given.extend != "auto" else None)
    return _Spot(path, given or []).rates()


def _check(file: CompareFile) -> list[Problem]:
    problems = _rates(("rates",), file.rates) + _Spot(("seeds",), file.seeds).repeated()
    for i, c in enumerate(file.methods):
        problems += _rates(("methods", i, "rates"), c.rates)
    if foreign := [s for s in file.search_seeds or () if s not in file.seeds]:
        problems.append(
            Problem(("search_seeds",), f"{foreign[0]} is not one of seeds ({', '.join(map(str, file.seeds))})")
        )
    if not isinstance(file.search, str) and file.training.early_stopping:
        problems.append(
            Problem(("training", "early_stopping"), "contradicts search: halving, which itself says when a trial ends")
        )
    metrics = table.get(file.task).metrics
    name = file.training.metric or next(iter(metrics))
    if name in metrics and not metrics[name].of_rows:
        others = " or ".join(other for other, metric in metrics.items() if metric.of_rows)
        message = (
            f"'{name}' is not made of scores of rows, so what other test rows would change is not known; use {others}"
        )
        problems.append(Problem(("training", "metric"), message))
    problems += [Problem(("where", name, "layers"), "is empty") for name, p in file.where.items() if p.layers == []]
    try:
        if isinstance(file.budget, int | str):
            number(file.budget)
    except ValueError as e:
        problems.append(Problem(("budget",), str(e)))
    labels = file.labels()
    for i, label in enumerate(labels):
        if label in labels[:i]:
            problems.append(Problem(("methods", i), f"another contender is called '{label}' too; give it a label"))
    return problems or _check_runs(file)


def _check_runs(file: CompareFile) -> list[Problem]:
    """The problems that each contender's run file would have, located in this file; repeated ones once."""
    contenders: list[tuple[KeyPath, ContenderSpec]] = [(("methods", i), c) for i, c in enumerate(file.methods)]
    if isinstance(file.budget, SameAs):
        contenders.append((("budget", "of"), file.budget.of))
    found: dict[Problem, None] = {}
    for path, contender in contenders:
        method, own = with_targets(contender, file.targets), contender.training
        run = file.run_file(method, file.a_rate, file.seeds[0], file.output, own)
        for p in check(run):
            its = p.path[0] == "method" or (p.path[0] == "training" and p.path[1] in own)
            found[Problem((*path, *p.path[1:]), p.message) if its else p] = None
        if p := _check_places(file, contender):
            found[Problem(path, p)] = None
    return list(found)


def _check_places(file: CompareFile, contender: ContenderSpec) -> str | None:
    if not file.where:
        return None
    try:
        known = config_fields(config_class(contender.name))
    except ValueError:
        return None  # reported already
    needed = {"target_modules": any(p.target_modules is not None for p in file.where.values())}
    needed["layers_to_transform"] = any(p.layers is not None for p in file.where.values())
    lacks = [key for key, need in needed.items() if need and key not in known]
    return f"'{contender.name}' has no field {lacks[0]}, so `where` cannot place it" if lacks else None


def with_targets(contender: ContenderSpec, targets: str | list[str]) -> dict[str, Any]:
    """The contender as the method of a run file, on the shared targets if it names none."""
    fields = dict(contender.fields)
    try:
        if "target_modules" in config_fields(config_class(contender.name)):
            fields.setdefault("target_modules", targets)
    except ValueError:
        pass  # an unknown method is reported with the others
    return {"name": contender.name, **fields}


def number(text: int | str) -> int:
    """A count as people write it: 1200000, "1.2M", "300k"; raises RankfoldError where it is not one."""
    return parse_budget(str(text))
