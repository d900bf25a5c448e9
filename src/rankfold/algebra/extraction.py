"""A LoRA out of a full fine-tune: ΔW = W_tuned − W_base of every linear layer as the source of a fold."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Unpack

import torch
from peft import LoraConfig
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from rankfold.algebra.models import ModelPair
from rankfold.errors import RankfoldError
from rankfold.fold import FoldOptions, FoldReport, fold_source
from rankfold.fold.sites import of_adapted_types, siblings
from rankfold.fold.source import Source, output_head
from rankfold.host.adapter import module_type
from rankfold.host.planning import site_of
from rankfold.io.adapters import classes_in
from rankfold.io.weights import FLOATS
from rankfold.text import examples

#: The end of a class's name → the task of an adapter for it.
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    **options: Unpack[FoldOptions],
) -> FoldReport:
    """Writes the best plain LoRA for what a full fine-tune changed. Both models are read a tensor at a time.

    Args:
        base, tuned: folders of the models with safetensors, or hub ids in the local cache.
        out: the folder to make; it appears whole or not at all.
        options: as in `fold_adapter`; rank or error must be given, and with both the smaller of the two holds.

    Raises:
        RankfoldError: models of different types or shapes, quantised, damaged or equal; neither rank nor error; and as
            `fold_adapter`.
    """
    if options.get("rank") is None and options.get("error") is None:
        raise RankfoldError(
            "the change of a full fine-tune is not a product of small matrices; say how large the LoRA may be with --rank N, or "
            "how near it must come with --error 0.1"
        )
    pair = ModelPair(str(base), str(tuned))
    return fold_source(
        extracted(pair, options.get("progress", False)),
        out,
        origin=f"{tuned} − {base}",
        inputs=[tuned],
        base=str(base),
        **options,
    )


def extracted(pair: ModelPair, progress: bool = False) -> Source:
    """The difference of two models as a source, after one look at every tensor; raises RankfoldError as `extract`."""
    model = pair.skeleton
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    body = {n: m for n, m in linear.items() if not _is_head(model, n)}
    weights = {f"{name}.weight": name for name in body}
    heads = _trained_heads(pair)
    changed = {n: c for n, c in _changes(pair, weights, progress).items() if c and n not in heads}
    if not changed:
        raise RankfoldError(f"{pair.second} and {pair.first} have the same weights; there is nothing to extract")
    adapted = [name for name in body if f"{name}.weight" in changed]
    whole, left = math.fsum(changed.values()), {}
    for name in changed.keys() - weights.keys():
        kind = module_type(pair.name_of(name)[0])
        left[kind] = left.get(kind, 0.0) + changed[name] / whole
    if not adapted:
        raise RankfoldError(f"no linear layer differs between {pair.first} and {pair.second}, only {examples([*left])}")

    def update(name: str) -> Tensor:
        found = pair.tensors(f"{name}.weight")
        assert found is not None
        return (found[1] - found[0]).T if isinstance(body[name], Conv1D) else found[1] - found[0]

    sites = [site_of(n, m) for n, m in body.items()]
    dtype = getattr(pair.configs[0], "dtype", None)
    return Source(
        method="a full fine-tune",
        config=LoraConfig(
            task_type=_task(model),  # pyright: ignore[reportArgumentType]
            base_model_name_or_path=pair.first,
            modules_to_save=sorted({key.split(".")[0] for key in heads}) or None,
            auto_mapping={"base_model_class": type(model).__name__},
        ),
        update=update,
        adapted=adapted,
        sites=of_adapted_types(sites, adapted),
        siblings=siblings(sites, adapted),
        modules=[name for name, _ in model.named_modules()],
        heads={f"base_model.model.{name}": tensor for name, tensor in heads.items()},
        dtype=dtype if dtype in FLOATS else next(model.parameters()).dtype,
        transposed=any(isinstance(body[name], Conv1D) for name in adapted),
        classes=classes_in(pair.configs[1]),
        notes=list(_notes(pair, left, heads)),
        left_out=left,
    )


def _is_head(model: nn.Module, name: str) -> bool:
    """Whether a linear layer lies outside the body that every task has, or makes the logits."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    outside = bool(prefix) and hasattr(model, prefix) and not name.startswith(f"{prefix}.")
    return outside or output_head(model, {name: model.get_submodule(name)}) is not None


def _changes(pair: ModelPair, weights: dict[str, str], progress: bool) -> dict[str, float]:
    """‖·‖²_F of the change of every tensor that both have in one shape."""
    found: dict[str, float] = {}
    shown = tqdm(
        pair.pairs(), "comparing", len(pair.common), delay=1.0, leave=False, disable=None if progress else True
    )
    for name, before, after in shown:
        if before.shape == after.shape:
            found[name] = float((after - before).square().sum())
        elif name in weights:
            raise RankfoldError(
                f"{name} is {tuple(before.shape)} in {pair.first} and {tuple(after.shape)} in {pair.second}; the models are "
                "not of one architecture"
            )
    stored = {pair.name_of(name)[0]: name for files in pair.files for name in files}
    partly = next((name for name in weights if stored.get(name, name) != name), None)
    if partly is not None:
        raise RankfoldError(
            f"transformers makes {partly} of a part of {stored[partly]} when it loads, which extract does not read; load both "
            "models with transformers, save them with save_original_format=False and give those folders"
        )
    if not any(name in found for name in weights):
        raise RankfoldError(
            f"the files of {pair.first} and {pair.second} name no linear layer as transformers does ({next(iter(stored), '')}, "
            f"where the model has {next(iter(weights), 'none')}); load both with transformers and give what save_pretrained writes"
        )
    missing = next((name for name in weights if name in set(pair.only(0)) ^ set(pair.only(1))), None)
    if missing is not None:
        raise RankfoldError(
            f"only one of {pair.first} and {pair.second} has {missing}; they are not of one architecture"
        )
    return found


def _trained_heads(pair: ModelPair) -> dict[str, Tensor]:
    """A classifier's head where the base has none or another: it is kept whole, as PEFT keeps trained heads."""
    model = pair.skeleton
    if _task(model) not in ("SEQ_CLS", "TOKEN_CLS") or not hasattr(model, model.base_model_prefix):
        return {}
    names = [name for name in pair.files[1] if not name.startswith(f"{model.base_model_prefix}.")]
    if all(n in pair.files[0] and torch.equal(pair.tensor(0, n), pair.tensor(1, n)) for n in names):
        return {}
    return {name: pair.tensor(1, name) for name in names}


def _task(model: nn.Module) -> str | None:
    return next((task for end, task in TASKS.items() if type(model).__name__.endswith(end)), None)


def _notes(pair: ModelPair, left: dict[str, float], heads: Iterable[str]) -> Iterable[str]:
    if left:
        each = ", ".join(f"{kind} {share:.2%}" for kind, share in sorted(left.items(), key=lambda kind: -kind[1]))
        yield f"left out, {sum(left.values()):.2%} of the change (‖·‖²_F), because no LoRA on linear layers holds it: {each}"
    other = [n for n in pair.common if pair.shape(0, n) != pair.shape(1, n)]
    for names, why in ((pair.only(1), "the base lacks it"), (other, "its shape is another in the base")):
        kept = [name for name in names if name not in heads]
        if kept:
            yield f"left out without a measure, because {why}: {examples(kept)}"
