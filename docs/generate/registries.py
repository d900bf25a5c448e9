"""The tables of methods, optimisers and tasks, from their registries."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields

from generate.markdown import code, page, table
from rankfold.host import registry
from rankfold.host.config import LowRankConfig
from rankfold.optim.options import Options
from rankfold.optim.registry import rows
from rankfold.runfile.methods import config_fields
from rankfold.tasks.table import TASKS

COMMON = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
    "use_rslora",
    "init_lora_weights",
    "share_dropout",
    "fuse_mlp",
    "allow_unscheduled",
    "fan_in_fan_out",
    "bias",
)
"""Fields that every config has, in the order of a reader's questions."""


def methods() -> str:
    found = [m for m in registry.find() if m.config.__module__.startswith("rankfold.")]
    listed = [
        (
            f"[{code(m.name)}](../methods/{m.name}.md)",
            code(m.config.__name__),
            _paper(m.paper),
            m.summary,
            m.folds_at if m.foldable else "no",
            "yes" if m.controller else "",
        )
        for m in found
    ]
    base = config_fields(LowRankConfig)
    parts = []
    for m in found:
        own = [f for f in config_fields(m.config).values() if f.name not in base or _field(f) != _field(base[f.name])]
        parts += [
            f"## {m.name}",
            f"{m.title}, `rankfold.{m.config.__name__}`: {m.summary} [Its page](../methods/{m.name}.md).",
        ]
        parts += [table(("field", "default", "meaning"), map(_field, own))] if own else ["No fields of its own."]
    return page(
        "Methods",
        "the registry of methods and the fields of their configs",
        "`rankfold methods` prints the list. *Folds at*: the rank of the plain LoRA that `rankfold fold` writes. *Schedule*: it needs "
        "`AdapterCallback` in a trainer or `rankfold.attach` in a loop of yours; run files attach it by themselves.",
        table(("name in run files", "config", "paper", "what it does", "folds at", "schedule"), listed),
        "GeLoRA is not a config but a choice of ranks before training: [`rankfold gelora`](../methods/gelora.md).",
        "## Fields of every method",
        "They have the names that PEFT's `LoraConfig` gives them; `share_dropout`, `fuse_mlp` and `allow_unscheduled` are ours. Where a method has "
        "another default, its own table says so.",
        table(("field", "default", "meaning"), (_field(base[name]) for name in COMMON)),
        *parts,
    )


def optimisers() -> str:
    found = [row for row in rows() if row.cls.__module__.startswith("rankfold.")]
    listed = [
        (f"[{code(r.name)}](../optimisers/{r.name}.md)", code(r.cls.__name__), _paper(r.paper), r.summary)
        for r in found
    ]
    shared = {f.name for f in fields(Options)}
    parts = []
    for row in found:
        own = [
            o for o in row.options() if o.name not in shared or _default(o) != _default(_named(fields(Options), o.name))
        ]
        parts += [f"## {row.name}", f"{row.title}, `rankfold.optim.{row.cls.__name__}`: {row.summary}"]
        parts += (
            [table(("option", "default", "meaning"), map(_field, own))] if own else ["Only the options that all have."]
        )
    return page(
        "Optimisers",
        "the registry of optimisers and their options",
        "`rankfold optimizers` prints the list, `rankfold optimizers NAME` the options of one. In a run file: "
        "`training: {optimizer: NAME, optimizer_options: {...}}`. [What they are](../optimisers.md).",
        table(("name in run files", "class in `rankfold.optim`", "paper", "what it does"), listed),
        "## Options of all",
        table(("option", "default", "meaning"), map(_field, fields(Options))),
        *parts,
    )


def tasks() -> str:
    listed = [
        (code(t.name), t.summary, " or ".join(map(code, t.models[:1])), code(t.trainer().__name__))
        for t in TASKS.values()
    ]
    parts = []
    for t in TASKS.values():
        metrics = [
            (code(name), "higher" if m.greater_is_better else "lower", "yes" if m.of_rows else "no")
            for name, m in t.metrics.items()
        ]
        parts += [
            f"## {t.name}",
            f"{t.summary[0].upper()}{t.summary[1:]}. Columns: "
            + "; or ".join(" + ".join(map(code, kind)) for kind in t.kinds)
            + f". Longest row where the run file names none: {f'{t.max_length:,} tokens' if t.max_length else 'rows are not tokens'}. "
            + f"PEFT's task type: {code(t.peft_type) if t.peft_type else 'it has none'}. "
            + ("A new head is trained in full beside the adapter." if t.new_head else "No head is added."),
            table(("metric", "better is", "`rankfold compare` can use it"), metrics),
        ]
    return page(
        "Tasks",
        "the table of tasks",
        "What `task:` of a run file may be. [Tasks](../tasks.md) says what is done to the rows, [data formats](data-formats.md) shows rows.",
        table(("task", "what it learns", "model", "trainer"), listed),
        *parts,
    )


def _paper(arxiv: str) -> str:
    return f"[{arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else ""


def _field(field: Field) -> tuple[str, str, str]:
    return code(field.name), code(_default(field)), field.metadata.get("help", "")


def _default(field: Field) -> str:
    value = field.default
    if value is MISSING:
        value = None if field.default_factory is MISSING else field.default_factory()
    return json.dumps(list(value) if isinstance(value, set) else value, default=str)


def _named(among: Iterable[Field], name: str) -> Field:
    return next(f for f in among if f.name == name)
