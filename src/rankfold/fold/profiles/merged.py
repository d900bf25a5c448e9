"""Profile `merged`: the whole model with the update added to its weights, for what cannot load adapters at all.

The sum is made in float64 and rounded once to the file's dtype. In half precision that rounding is of the order of a
small update itself; the proof is about what was saved: ‖W′ − W − ΔW‖ / ‖ΔW‖.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import RankfoldError
from rankfold.fold.profiles.merged_files import copy_files, restore_names, write_config
from rankfold.fold.profiles.profile import Folded, Profile, Written
from rankfold.fold.source import base_model
from rankfold.host.kinds import kind_of
from rankfold.host.layer import Kind
from rankfold.io.models import quiet
from rankfold.io.weight_names import to_model
from rankfold.io.weights import base_files, weight_reader
from rankfold.kernel.factors import Factors

#: Files larger than this are split.
MAX_SHARD = "5GB"


def rounded(exact: Factors, dtype: torch.dtype) -> Factors:
    """float32, whatever the file's dtype: the sum is rounded, not its terms."""
    return exact.to(torch.float32)


def write(folded: Folded, folder: Path) -> Written:
    """safetensors under the base's names, its config.json with what changed, and every file that belongs to the model."""
    model: Any = _base(folded)
    with torch.no_grad():
        for name in folded.source.adapted:
            module, kind = _adaptable(model, name)
            delta = folded.factors[name].to(torch.float64).delta()  # out × in
            added = module.weight.double() + kind.in_weight_layout(delta, module.weight)
            module.weight = nn.Parameter(added.to(folded.dtype), requires_grad=False)
        _load_heads(model, {k.removeprefix("base_model.model."): v for k, v in folded.source.whole.items()})
    model.to(folded.dtype)
    broken = next((n for n, p in model.named_parameters() if not torch.isfinite(p).all()), None)
    if broken:
        raise RankfoldError(
            f"profile merged: {broken} is not finite in {folded.dtype}; give --dtype float32, or bfloat16 where float16 is "
            "too narrow"
        )
    config, classes = model.config, folded.source.classes
    if len(classes.names) == getattr(config, "num_labels", None):
        config.id2label = dict(enumerate(classes.names))
        config.label2id = {label: i for i, label in enumerate(classes.names)}
    if classes.problem is not None:
        config.problem_type = classes.problem
    with quiet():
        model.save_pretrained(folder, max_shard_size=MAX_SHARD)  # pyright: ignore[reportCallIssue]
    parameters = sum(p.numel() for p in model.parameters())
    base, revision = str(folded.base), folded.source.config.revision
    notes = [
        *restore_names(base_files(base, revision), folder, str(getattr(model, "base_model_prefix", ""))),
        *write_config(base, revision, folder),
        *copy_files(base, revision, folded.source.folder, folder),
    ]
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    if classifies and getattr(config.get_text_config(), "pad_token_id", None) is None:
        notes.append(
            "config.json has no pad_token_id, as the base's has none: transformers takes one text at a time until you set it to "
            "that of the tokenizer"
        )
    if folded.dtype != torch.float32:
        notes.append(
            "the error on disk is that of W+ΔW rounded, relative to ΔW: 1 means that a layer's update is lost; "
            "--dtype float32, or a fold that stays an adapter, keeps it"
        )
    return Written(
        rank=folded.rank,
        parameters=parameters,
        read=_reader(folded, folder, model),
        serve={
            "vLLM": f"vllm serve {quote(str(folded.out))}",
            "transformers": f"{type(model).__name__}.from_pretrained({str(folded.out)!r})",
            "llama.cpp": f"convert_hf_to_gguf.py {quote(str(folded.out))}",
        },
        notes=notes,
    )


def _base(folded: Folded) -> nn.Module:
    """The base in the dtype of its own files."""
    if not folded.base:
        raise RankfoldError(
            "profile merged needs the weights of the base model, which is not known; give --base FOLDER"
        )
    model = base_model(folded.source.config, folded.base, "auto", folded.source.whole)
    base_files(folded.base, folded.source.config.revision)  # the proof reads them one by one
    if getattr(model, "is_quantized", False):
        raise RankfoldError(
            f"profile merged: base={folded.base!r} is quantised and cannot hold a sum; give --base the float weights"
        )
    return model


def _adaptable(model: nn.Module, name: str) -> tuple[Any, Kind]:
    """The module of this name, and its kind; raises ValueError where there is none, or where another has the same weight."""
    modules: dict[str, Any] = dict(model.named_modules())
    module = modules.get(name)
    if module is None and to_model(model)(f"{name}.weight")[1]:
        raise RankfoldError(
            f"profile merged: {name} is one of several experts that this version of transformers fuses into one parameter, to which "
            "it does not add; fold with --profile uniform, or load the adapter with PEFT and call merge_and_unload()"
        )
    kind = None if module is None else kind_of(module)
    if module is None or kind is None:
        raise RankfoldError(f"profile merged: {type(model).__name__} has no layer {name!r}; was the adapter's another?")
    other = next(
        (n for n, m in modules.items() if m is not module and getattr(m, "weight", None) is module.weight), None
    )
    if other is not None:
        raise RankfoldError(
            f"profile merged: {name} shares its weight with {other}, which would change too; fold with --profile uniform, whose "
            f"update is that of {name} alone"
        )
    return module, kind


def _load_heads(model: nn.Module, heads: Mapping[str, Tensor]) -> None:
    """Puts the trained heads in; raises ValueError for one that the base lacks, or has in common with another layer."""
    own = dict(model.named_parameters(remove_duplicate=False))
    for key, head in heads.items():
        shared = [k for k, p in own.items() if k != key and p is own.get(key)]
        other = next((k for k in shared if k not in heads or not torch.equal(heads[k], head)), None)
        if other is not None:
            raise RankfoldError(
                f"profile merged: {key}, which the adapter saved in modules_to_save, shares its weight with {other}, which "
                "would change too; use --profile uniform, which PEFT loads"
            )
    for key, head in heads.items():
        if key in own and own[key].shape != head.shape:
            raise RankfoldError(
                f"profile merged: the adapter's {key} is {tuple(head.shape)} and the base's {tuple(own[key].shape)}; give the base "
                "it was trained on with --base FOLDER"
            )
    unknown = model.load_state_dict(heads, strict=False).unexpected_keys
    if unknown:
        raise RankfoldError(f"profile merged: the base has no {unknown[0]}, which the adapter saved in modules_to_save")


def _reader(folded: Folded, folder: Path, model: nn.Module) -> Callable[[str], Tensor]:
    """What was added to a module's weight: the saved one minus the base's, out × in in float64, one at a time."""
    before = weight_reader(folded.base, folded.source.config.revision, model)
    after = weight_reader(str(folder), None, model)
    kinds = {name: _adaptable(model, name)[1] for name in folded.source.adapted}
    return lambda name: kinds[name].as_matrix(after(name).double() - before(name).double())


PROFILE = Profile(write, rounded, noun="a merged model", library="transformers", loads_as="model")
