"""What a task after the first one trains, as a change of its run file: `next_task` says which of three."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import set_seed

from rankfold.continual.file import Rule
from rankfold.host import registry
from rankfold.io.adapters import read_config, write_labels
from rankfold.io.files import whole_folder
from rankfold.io.models import locate
from rankfold.runfile.checks import peft_config
from rankfold.runfile.methods import config_fields
from rankfold.runfile.schema import RunFile
from rankfold.train import model

START = "start"


def changes(rule: Rule, before: list[RunFile], seed: int) -> dict[str, Any]:
    """What differs from the file in the run file of the task after some others, by section.

    Args:
        before: the run files of the tasks before it, which are trained.
        seed: of the task.
    """
    if not before:
        return {}
    adapters = [str(Path(run.output, "adapter")) for run in before]
    if rule == "continue":
        return {"training": {"start_from": adapters[-1]}}
    if rule == "fresh":
        return {"model": {"adapters": [*before[0].model.adapters, *adapters]}}
    start = Path(before[-1].output, f"next-{START}")
    if not start.is_dir():
        _begin(before[-1], start, seed)
    method = {"name": before[-1].method.name, **before[-1].method.fields, **_written(Path(adapters[-1]), start)}
    return {"training": {"start_from": str(start)}, "method": method}


def _begin(run: RunFile, start: Path, seed: int) -> None:
    """Ends the task of a run by the method's own rule, and writes the adapter that the next one starts from."""
    row = registry.get(run.method.name)
    assert row.next_task is not None
    place = locate(run.model.name)
    labels = [str(label) for label in run.data.labels or ()]
    base, new = model.load_model(run, place, model.load_config(run, place, labels))
    adapted = model.adapt(base, peft_config(run), new, model.load_processor(run, place))
    model.start_from(adapted, Path(run.output, "adapter"), labels)
    set_seed(seed)  # new directions are drawn
    row.next_task(adapted, "default")
    with whole_folder(start, force=True) as folder:
        adapted.save_pretrained(str(folder))
        write_labels(labels, folder)


def _written(adapter: Path, start: Path) -> dict[str, Any]:
    """The fields of the config that the rule changed."""
    old, new = read_config(adapter), read_config(start)
    return {f: getattr(new, f) for f in config_fields(type(new)) if getattr(new, f) != getattr(old, f)}
