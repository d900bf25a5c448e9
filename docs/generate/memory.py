"""What the methods train and keep on common shapes of models, counted by `rankfold plan` from configs alone."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from generate.markdown import page, table
from rankfold.plan.candidates import parse
from rankfold.plan.cost import cost
from rankfold.plan.folding import Fold
from rankfold.plan.meta import meta_model
from rankfold.plan.ranks import in_words
from rankfold.text import count, size

# The shapes of the published configs, written down so that the table needs no network.
SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "Llama-3.2-1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "head_dim": 64, "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip
METHODS = ("lora", "rasa", "sora", "adalora", "sbora", "peft:dora")
RANK = 16


def memory() -> str:
    return page(
        "Parameters and memory",
        "`rankfold plan`'s counts on the shapes below",
        f"Every linear layer but the output head is adapted, r = {RANK}. The models are counted from their shapes, as published in their configs; "
        "no weight is loaded. `rankfold plan --model MODEL` makes the same table for your model, in seconds; [planning](../planning.md) "
        "explains its columns.",
        "*AdamW's state*: two float32 values per trained parameter. *Serve at*: the rank of the folded file, padded to what engines name. "
        "What activations take depends on your batch and is not counted; the result of a run has its peak memory. "
        "The weights of the base, in the dtype that you load, come on top.",
        "Times are not in this table: what was timed, and on what, is in [performance](../performance.md). Nothing was timed on an accelerator.",
        *map(section, SHAPES),
    )


def section(name: str) -> str:
    """The table of one model."""
    total, rows = _counted(SHAPES[name])
    head = ("method", "ranks", "trained", "of the model", "AdamW's state", "saved (float32)", "folded LoRA", "serve at")
    about = f"{count(total)} parameters, {size(2 * total)} of weights in bfloat16."
    return f"## {name}\n\n{about}\n\n{table(head, rows)}"


def _counted(shape: dict[str, Any]) -> tuple[int, list[tuple[str, ...]]]:
    about = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", **shape}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(about), encoding="utf-8")
        base = meta_model(folder)
    total = sum(p.numel() for p in base.parameters())
    return total, [_row(base, name, total) for name in METHODS]


def _row(base: Any, name: str, total: int) -> tuple[str, ...]:
    config = parse(name).with_rank(RANK).config(base, None, "all-linear")
    found = cost(base, config)
    fold = found.fold if isinstance(found.fold, Fold) else None
    return (
        f"`{name}`",
        in_words(config),
        f"{found.trained:,}",
        f"{found.trained / total:.2%}",
        size(found.optimizer_bytes),
        size(4 * found.stored),
        "not exactly" if found.folded is None else count(found.folded),
        str(fold.served) if fold else "",
    )
