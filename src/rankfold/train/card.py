"""The model card beside the adapter: what it is, what it was trained on, what it costs, how well it does, how to use it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from rankfold.runfile.optimizers import row_of
from rankfold.runfile.yaml import write
from rankfold.text import size

if TYPE_CHECKING:
    from rankfold.runfile.schema import Training
    from rankfold.train.prepare import Prepared
    from rankfold.train.result import TrainResult

PACKAGES = ("rankfold", "peft", "transformers", "trl", "torch", "datasets")


def versions() -> dict[str, str]:
    """Python's and those of the packages that a run depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def model_card(prepared: Prepared, result: TrainResult) -> str:
    """The README.md of the adapter's folder."""
    from rankfold.io import assets as bundled

    run, rows = prepared.run, prepared.rows
    ours = not run.method.name.startswith("peft:")
    front = {
        "library_name": "peft",
        "base_model": run.model.name,
        "pipeline_tag": prepared.task.pipeline,
        "tags": ["rankfold", run.method.name.removeprefix("peft:"), run.task],
    }
    source = run.data.source or run.data.train
    data = bundled.DATASETS.get(source or "")
    base = bundled.MODELS.get(run.model.name)
    splits = ", ".join(f"{len(split):,} {name}" for name, split in rows.splits.items())
    fields = "\n".join(f"| {key} | `{value}` |" for key, value in run.method.fields.items())
    t = run.training
    batch = f"batch {t.batch_size}"
    if t.gradient_accumulation > 1 or result.processes > 1:
        batch += f" x {t.gradient_accumulation} accumulated x {result.processes} processes"
    seen = (
        f" in {result.seconds / 60:.1f} minutes" if result.resumed_at is None else f", resumed at {result.resumed_at:,}"
    )
    best = f"; the checkpoint of step {result.best_step} is kept, the best on validation" if result.best_step else ""
    scores = "\n".join(f"| {name} | {before} | {after} |" for name, before, after in result.scores())
    results = "No rows were held out to measure it on."
    if scores:
        results = f"On the {result.measured_on} rows.\n\n| metric | before | after |\n|---|---|---|\n{scores}"
    model_class = prepared.task.models[0]
    arguments = f", revision={run.model.revision!r}" if run.model.revision else ""
    arguments += f", id2label={dict(enumerate(rows.labels))}" if rows.labels else ""
    classes = f"| classes | {', '.join(rows.labels)} |\n" if rows.labels else ""
    ranks = "".join(f"| {name} | {value} |\n" for name, value in result.ranks_row())
    title, home = run.method.name, "rankfold."
    if ours:
        from rankfold.host import registry

        row = registry.get(run.method.name)
        title, home = row.title, row.config.__module__
    module = "rankfold" if home.startswith("rankfold.") else home
    use = f"import {module}  # makes {title} known to PEFT\n" if ours else ""
    earlier = "".join(
        f"model = PeftModel.from_pretrained(model, {folder!r}).merge_and_unload()\n" for folder in run.model.adapters
    )
    option = getattr(prepared.peft_config, "fold_option", "")
    near = "a plain LoRA that comes near it" if option else "a plain LoRA of it"
    plain = (
        f"`rankfold fold path/to/this/folder -o folded{option}` makes {near}, which needs no rankfold.\n\n"
        if ours
        else ""
    )
    return f"""---
{write(front).strip()}
---

# {prepared.run.output.rstrip("/").rpartition("/")[2]}

An adapter of `{run.model.name}` for {run.task}, trained with **{title}** by
[rankfold](https://pypi.org/project/rankfold) on `{source}`.

| | |
|---|---|
| base model | `{run.model.name}`{f" ({base.licence})" if base else ""} |
| data | `{source}`: {splits} rows{f" ({data.licence})" if data else ""} |
{classes}| method | {title} |
{fields}
| trainable parameters | {result.trainable:,} (adapter {result.adapter:,}, head {result.head:,}) of {result.total:,} |
| stored parameters | {result.stored:,} ({size(result.stored_bytes)}) |
{ranks}| training | {result.steps:,} steps ({result.epochs:.3g} epochs){seen}{best} |
| optimiser | {_optimizer(t)}, learning rate {t.learning_rate:g} ({t.schedule}), {batch}, seed {t.seed} |

## Results

{results}

## Use

```python
from peft import PeftModel
from transformers import {model_class}
{use}
model = {model_class}.from_pretrained({prepared.place!r}{arguments})
{earlier}model = PeftModel.from_pretrained(model, "path/to/this/folder")
```

{plain}## Made by

```
{result.command}
```

{", ".join(f"{name} {number}" for name, number in result.versions.items())}
{_citation(data.citation if data else "", run.method.name, t.optimizer)}"""


def _optimizer(training: Training) -> str:
    """Its name in a run file, its title where it is one of rankfold's, and its options."""
    row = row_of(training.optimizer)
    options = ", ".join(f"{key} {value}" for key, value in training.optimizer_options.items())
    title = f"{row.title} (`{row.name}`)" if row else training.optimizer
    return f"{title}, {options}" if options else title


def _citation(data: str, method: str, optimizer: str) -> str:
    lines = []
    if data:
        lines.append(f"Data: {data}")
    if not method.startswith("peft:"):
        from rankfold.host import registry

        row = registry.get(method)
        lines.append(f"Method: {row.title}, [arXiv {row.paper}](https://arxiv.org/abs/{row.paper}).")
    if (found := row_of(optimizer)) is not None and found.paper:
        lines.append(f"Optimiser: {found.title}, [arXiv {found.paper}](https://arxiv.org/abs/{found.paper}).")
    return "\n" + "\n\n".join(lines) + "\n" if lines else ""
