"""The keys of the run file and of the compare file, from the pydantic fields that check them."""

from __future__ import annotations

import json
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from generate.markdown import code, page, table
from rankfold.compare.file import CompareFile, ContenderSpec, Extension, Halving, Place
from rankfold.runfile.schema import Data, Method, Model, RunFile, Training
from rankfold.tasks import table as tasks


def run_file() -> str:
    sections = [("model", Model), ("data", Data), ("method", Method), ("training", Training)]
    return page(
        "Run file",
        "src/rankfold/runfile/schema.py",
        "What `rankfold train` and `rankfold validate` read. `rankfold init run.yaml` writes one with a comment above every key; "
        "`key=value` behind the file changes a value for one call: `rankfold train run.yaml training.seed=1`. An unknown key, a value "
        "of another type and a value out of range are errors, all reported at once with their lines.",
        "From Python: `rankfold.runfile.load.load(path)` or `parse(dictionary)`, then `rankfold.train.train(run)`; see "
        "[train from Python](../python.md#rankfold-train-from-python).",
        "## The whole file",
        _keys(RunFile),
        "`model: NAME`, `data: NAME` and `method: NAME` are short for `{name: NAME}`, `{source: NAME}` and `{name: NAME}`.",
        *(part for name, section in sections for part in (f"## {name}", _about(name), _keys(section))),
        "## data.columns",
        "What your columns are called, where they differ from ours: `data.columns: {text: review, label: stars}`. The names of all tasks "
        f"are known: {', '.join(code(column) for column in tasks.columns())}. Which task takes which: [data formats](data-formats.md).",
    )


def compare_file() -> str:
    return page(
        "Compare file",
        "src/rankfold/compare/file.py",
        "What `rankfold compare` reads; [comparing](../comparing.md) explains it with an example. `rankfold init compare.yaml --compare` "
        "writes one.",
        "## The whole file",
        _keys(CompareFile),
        "## methods",
        "A name, or a mapping with these keys beside the fields of the method's config:",
        _keys(ContenderSpec),
        "## where",
        "Named sets of layers; each is a mapping:",
        _keys(Place),
        "## search.halving",
        _keys(Halving),
    )


def _about(section: str) -> str:
    if section != "method":
        return ""
    return (
        "Beside `name` stand the fields of the method's config: [methods](methods.md) lists them. PEFT's own methods are named "
        "`peft:lora`, `peft:dora` and so on, with the fields of PEFT's config."
    )


def _keys(section: type[BaseModel]) -> str:
    rows = [(code(name), _type(f), _default(f), f.description or "") for name, f in section.model_fields.items()]
    return table(("key", "type and allowed values", "default", "meaning"), rows)


def _type(field: FieldInfo) -> str:
    bounds = []
    for limit in field.metadata:
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"), ("min_length", "at least")):
            if (value := getattr(limit, name, None)) is not None:
                bounds.append(f"{sign} {value}{' of them' if name == 'min_length' else ''}")
    return ", ".join([type_in_words(field.annotation), *bounds])


def type_in_words(hint: Any) -> str:
    """A type as a reader of YAML would say it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return type_in_words(inner[0])
    if origin in (Union, UnionType):
        return " or ".join("null" if part is NoneType else type_in_words(part) for part in inner)
    if origin is Literal:
        return ", ".join(code(value) for value in inner)
    if origin is list:
        return f"list of {type_in_words(inner[0])}"
    if origin is dict or (isinstance(hint, type) and issubclass(hint, BaseModel)):
        return "mapping"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}.get(hint, "any")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Extension):
        return code(value.extend)
    if isinstance(value, BaseModel):
        return "those of its keys"
    return code(value if isinstance(value, str) else json.dumps(value))
