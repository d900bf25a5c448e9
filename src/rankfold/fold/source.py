"""Where a fold comes from: what every source offers, and how adapter folders and bases are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

import rankfold.methods  # noqa: F401  (registers the methods with PEFT)
from rankfold.errors import RankfoldError
from rankfold.host.adapter import Site
from rankfold.host.checkpoint import plain_name, without_wrappers
from rankfold.io.adapter_names import PREFIX, is_saved
from rankfold.io.adapters import Classes
from rankfold.io.models import ModelError, input_embeddings, load_base, model_config, named_class, quiet, skeleton
from rankfold.kernel.factors import Factors
from rankfold.tasks import table

#: The update of one module, on the CPU in float64: its factors, or out × in where the method has no factor form.
Update = Factors | Tensor


@dataclass(frozen=True)
class Source:
    """One adapter, ready to be folded.

    Args:
        method: what it is, for people: our name of it, or PEFT's as in "peft:dora".
        config: its config, of which a fold keeps base, revision, task type and modules_to_save.
        update: the trained update of a module by name, with gate and scale; in any order.
        blocks: the same as it lies on a live model, in its dtype and on its device; None where nothing is live.
        adapted: names of the modules that have the adapter, as the base model knows them.
        sites: every linear module of a type that has the adapter, adapted or not, in the model's order.
        siblings: more sites, without an adapter, that SGLang wants beside those.
        modules: every module name of the base model.
        parameters: every parameter name of the base model, where parameters are adapted.
        experts: by adapted module's fused parameter the names of the modules that it once was, `{}` for the expert's index, where they are
            known.
        heads: tensors of modules_to_save, by their name in the checkpoint.
        vocabulary: whole embeddings and output heads that PEFT saved beside the adapter, as it does where the vocabulary was
            resized; only a merged model holds them.
        dtype: the base's.
        transposed: the base's weights are in × out (Conv1D).
        output_head: the adapted module that makes the logits, if there is one; no engine loads its LoRA.
        folder: the adapter's folder, if it comes from one.
        classes: of a classifier, as far as they are known.
        notes: what the user of the fold should know.
        unlike_peft: the adapted convolutions of which PEFT's LoRA computes something else.
        left_out: what was trained too and no LoRA holds: the kind of tensor → its share of the whole change, of ‖·‖²_F.
    """

    method: str
    config: PeftConfig
    update: Callable[[str], Update]
    adapted: list[str]
    sites: list[Site]
    modules: list[str]
    heads: dict[str, Tensor]
    dtype: torch.dtype
    transposed: bool
    output_head: str | None = None
    vocabulary: dict[str, Tensor] = field(default_factory=dict)
    siblings: list[Site] = field(default_factory=list)
    folder: Path | None = None
    classes: Classes = field(default_factory=Classes)
    blocks: Callable[[str], Sequence[Factors]] | None = None
    notes: list[str] = field(default_factory=list)
    unlike_peft: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    experts: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, float] = field(default_factory=dict)

    @property
    def whole(self) -> dict[str, Tensor]:
        """All that takes the place of weights of the base, by its name in the checkpoint."""
        return {**self.heads, **self.vocabulary}


def folding_device(tensor: Tensor) -> torch.device:
    """Where a fold computes: on the CPU; what has a shape and no numbers, as in a plan, stays where it is."""
    return tensor.device if tensor.is_meta else torch.device("cpu")


def output_head(base: nn.Module, adapted: Mapping[str, nn.Module]) -> str | None:
    """Which of the adapted modules makes the logits of a language model."""
    head = getattr(base, "get_output_embeddings", lambda: None)()
    return next((name for name, module in adapted.items() if module is head or name.endswith("lm_head")), None)


def vocabulary_of(base: nn.Module, heads: Mapping[str, Tensor], kept: list[str]) -> dict[str, Tensor]:
    """Of the tensors beside an adapter, the embeddings and output heads that its modules_to_save does not name."""
    ends = input_embeddings(base), getattr(base, "get_output_embeddings", lambda: None)()
    names = {f"{PREFIX}{name}.weight" for name, module in base.named_modules() if any(module is end for end in ends)}
    return {key: tensor for key, tensor in heads.items() if key in names and not is_saved(key, kept)}


def live_base(model: nn.Module) -> nn.Module:
    """The base of a live model, PeftModel or injected, whatever wraps either."""
    model = without_wrappers(model)
    return without_wrappers(model.get_base_model() if isinstance(model, PeftModel) else model)


def saved_live(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """What PEFT saves of a live adapter, without whole embeddings, by the keys in a file: a model that it was injected into has none
    of its prefix, and one with wrappers has their names."""
    saved = get_peft_model_state_dict(without_wrappers(model), adapter_name=adapter_name, save_embedding_layers=False)
    return {PREFIX + plain_name(key).removeprefix(PREFIX): tensor for key, tensor in saved.items()}


def never_adapted(config: PeftConfig) -> str | None:
    """`exclude_modules` as one pattern that also says what PEFT leaves out because it is trained in full: a head can be one of the
    targets too (all-linear)."""
    given = getattr(config, "exclude_modules", None) or []
    ends = [] if isinstance(given, str) else [rf"(.*\.)?{re.escape(name)}" for name in given]
    heads = [rf"(.*\.)?{name}(\..*)?" for name in getattr(config, "modules_to_save", None) or []]
    return "|".join([*([given] if isinstance(given, str) else ends), *heads]) or None


@contextmanager
def fitting(folder: Path, config: PeftConfig, base: str | None) -> Iterator[None]:
    """What PEFT makes of a config that is damaged or of another base, as a ValueError that says so."""
    try:
        yield
    except (TypeError, AttributeError, KeyError) as error:
        raise RankfoldError(f"{folder}/adapter_config.json: PEFT cannot use a value in it ({error})") from error
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        targets = getattr(config, "target_modules", None)
        first = repr(targets if isinstance(targets, str) else min(targets or [""]))
        raise RankfoldError(
            f"{folder}: base={base!r} has no module of its target_modules, such as {first}; give the base it was trained "
            "on with --base FOLDER"
        ) from None


def base_config(name: str | None, revision: str | None) -> PretrainedConfig:
    """The base model's config; raises ValueError where it cannot be had."""
    if not name:
        raise RankfoldError("the adapter's config does not name its base model; give it with --base FOLDER")
    if (Path(name).is_absolute() or name.startswith(".")) and not Path(name).exists():
        raise RankfoldError(
            f"base={name!r} does not exist, it may have been moved; give its new place with --base FOLDER"
        )
    try:
        return model_config(name, **({"revision": revision} if revision else {}))
    except ModelError as error:
        raise RankfoldError(f"base={name!r}: its config.json cannot be read ({error}); give --base FOLDER") from None


def base_skeleton(
    config: PeftConfig, base: str | None, fits: Callable[[nn.Module], bool] = lambda model: True
) -> PreTrainedModel:
    """The base model on the meta device, from its config alone.

    Args:
        fits: whether a class of the base has the modules that the adapter names; the first one that has is taken.

    Raises:
        RankfoldError: the config cannot be had, or no class can be made of it.
    """
    name = base or config.base_model_name_or_path
    known, built, failed = base_config(name, config.revision), [], None
    for maker in _classes(config, known):
        try:
            built.append(skeleton(known, (maker,)))
        except ModelError as error:
            failed = failed or error
            continue
        if fits(built[-1]):
            return built[-1]
    if not built:
        raise RankfoldError(f"base={name!r}: {failed}; give the base it was trained on with --base FOLDER") from None
    return built[0]


def base_class(config: PeftConfig, base: str | None = None) -> Any:
    """The class to load the base model with: of the adapter's task, else what it was trained on, else what the base says.

    Args:
        base: where the base is, if not where the adapter's config says.
    """
    try:
        known = base_config(base or config.base_model_name_or_path, config.revision)
    except RankfoldError:
        known = None
    return _classes(config, known)[0]


def _classes(config: PeftConfig, base: PretrainedConfig | None) -> list[Any]:
    """The classes that an adapter may have been trained on, the likeliest first; those that have no model of the base's config
    are left out. Transformers' own `add_adapter` saves neither a task nor a class."""
    task = table.of_adapter(config.task_type)
    names = [task.models[0]] if task else []
    names += [
        n
        for n in ((config.auto_mapping or {}).get("base_model_class"), *(getattr(base, "architectures", None) or []))
        if n
    ]
    makers = [named_class(name) for name in (*names, None)]
    found = [maker for maker in makers if base is None or _has(maker, base)]
    return list(dict.fromkeys(found or makers))


def _has(maker: Any, base: PretrainedConfig) -> bool:
    mapping = getattr(maker, "_model_mapping", None)
    return mapping is None or type(base) in mapping


def base_model(
    config: PeftConfig, name: str | None, dtype: torch.dtype | str, tensors: Mapping[str, Tensor]
) -> PreTrainedModel:
    """The base model with its weights, on which an adapter is put or into which it is merged.

    Args:
        config: the adapter's.
        name: folder or hub id.
        dtype: of the weights; "auto" keeps the file's.
        tensors: the adapter's, whose modules_to_save say how many labels a new head has, and its embeddings how many words.

    Raises:
        OSError, ValueError: the weights cannot be had.
    """
    base_config(name, config.revision)  # says in a sentence what load_base would in a paragraph
    made = base_class(config, name)
    task = table.of_adapter(config.task_type, made.__name__)
    labels = _labels(tensors, config) if task and task.new_head else None
    model = load_base(made, name, dtype, labels, config.revision)
    embeddings: Any = input_embeddings(model)
    key = next((f"{PREFIX}{n}.weight" for n, m in model.named_modules() if m is embeddings), "")
    if key in tensors and len(tensors[key]) != len(embeddings.weight):
        with quiet():
            model.resize_token_embeddings(len(tensors[key]), mean_resizing=False)
    return model


def _labels(tensors: Mapping[str, Tensor], config: PeftConfig) -> int | None:
    """Number of labels, from the saved head: the smallest output of its matrices."""
    kept = getattr(config, "modules_to_save", None) or []
    heads = [v for k, v in tensors.items() if is_saved(k, kept) and k.endswith("weight")]
    return min((v.shape[0] for v in heads if v.ndim == 2), default=None)
