"""The pretrained model of a run, with its tokenizer and its adapter."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rankfold.errors import RankfoldError, nearest, short
from rankfold.host.memory import check_fits
from rankfold.host.names import absent_in_words, linear_layers_in_words
from rankfold.host.targets import absent_names
from rankfold.io import assets as bundled
from rankfold.io.adapters import labels_in, read_config, read_labels, read_tensors
from rankfold.io.models import ModelError, locate, meta_copy, reading, skeleton
from rankfold.tasks import table
from rankfold.tasks.classes import as_known
from rankfold.train.budget import count
from rankfold.train.widening import train_in_float32

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedConfig

    from rankfold.runfile.schema import Model, RunFile

# Task types for which PEFT itself leaves heads of these names out of all-linear, trains and saves them.
_HEADS_OF_PEFT = {"SEQ_CLS": {"classifier", "score"}}


def load_tokenizer(model: Model, place: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer; it can pad."""
    tokenizer = _from(AutoTokenizer, model, place)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"model.name: the tokenizer of '{model.name}' has neither a pad token nor an eos token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_processor(run: RunFile, place: str) -> Any:
    """What turns the rows into the model's inputs: its tokenizer, or what the task names instead."""
    kind = table.get(run.task).processor
    if kind == "AutoTokenizer":
        return load_tokenizer(run.model, place)
    return _from(getattr(transformers, kind), run.model, place)


def known_classes(run: RunFile, place: str) -> tuple[str, list[str]]:
    """Which field of the run names the head that it begins with, and the classes of that head in order of their index; [] where
    the head is new, or its classes have no names.

    Raises:
        ModelError: what says them cannot be read.
    """
    task = table.get(run.task)
    if not task.new_head:
        return "", []
    start = run.training.start_from
    adapters = [("training.start_from", start)] if start is not None else []
    adapters = adapters or [(f"model.adapters.{i}", name) for i, name in enumerate(run.model.adapters)]
    if adapters:
        field, name = adapters[-1]
        try:
            return f"{field}: '{name}'", read_labels(Path(name))
        except RankfoldError as e:
            raise ModelError(f"{field}: '{name}': {e}") from e
    config = _from(AutoConfig, run.model, place)
    has_head = any(name.endswith(task.heads) for name in config.architectures or ())
    return f"model.name: '{run.model.name}'", labels_in(config) if has_head else []


def check_order(labels: list[str], known: list[str], where: str) -> list[str]:
    """Checks that a run has its classes in the order of the head that it begins with.

    Args:
        labels: the run's classes. known, where: what `known_classes` says.

    Returns:
        Sentences for the reader.

    Raises:
        ModelError: they are the same classes in another order, so every output would be learnt anew for another class.
    """
    right = as_known(labels, known)
    if right is not None and right != labels:
        raise ModelError(
            f"{where} knows the classes {short(known)} in this order, this run has {short(labels)}; "
            f"set data.labels: {json.dumps(right)}"
        )
    if right is None and len(known) == len(labels) and not all(label.isdecimal() for label in labels):
        return [f"{where} knows the classes {short(known)}; its head is trained on for {short(labels)}, in this order"]
    return []


def load_config(run: RunFile, place: str, labels: list[str]) -> PreTrainedConfig:
    """The model's config, with the run's classes."""
    names: dict[str, Any] = {}
    if labels:
        names = {
            "num_labels": len(labels),
            "problem_type": "single_label_classification",  # whatever the model was trained for before
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
        }
    return _from(AutoConfig, run.model, place, **names)


def load_model(
    run: RunFile, place: str, config: PreTrainedConfig, *, weights: bool = True
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the modules that must be trained in full because their weights are new.

    Without `weights` it is built on the meta device: shapes and counts, no memory.
    """
    task = table.get(run.task)
    auto = getattr(transformers, task.models[0])
    options: dict[str, Any] = {"attn_implementation": run.model.attention} if run.model.attention else {}
    if not weights:
        dtype = _dtype(run.model, config)
        with _naming_fields(run.model):
            model = skeleton(config, (auto,), dtype=dtype, trust_remote_code=run.model.trust_remote_code, **options)
        return model, heads(model) if task.new_head else []
    with _naming_fields(run.model):
        model, report = _from(
            auto, run.model, place, config=config, dtype=run.model.dtype, output_loading_info=True, **options
        )
    _reject_nan(model, run.model.name)
    model = _merged(model, run.model.adapters)
    new = {key.rpartition(".")[0] for key in report["missing_keys"]}
    if task.new_head:
        head = heads(model)
        return model, head + sorted(module for module in new if module.split(".")[0] not in head)
    if new:
        raise ModelError(f"model.name: '{run.model.name}' lacks weights of a language model: {', '.join(sorted(new))}")
    return model, []


def _merged(model: PreTrainedModel, adapters: list[str]) -> PreTrainedModel:
    """The model with the updates of adapter folders in its weights, and with their heads."""
    for i, folder in enumerate(adapters):
        where = f"model.adapters.{i}"
        for p in model.parameters():
            _refuse_narrow(p.dtype, where)
        try:
            config = read_config(Path(folder))
            adapted = PeftModel.from_pretrained(model, folder, config=config)
            model = adapted.merge_and_unload(safe_merge=True)  # pyright: ignore[reportAssignmentType, reportCallIssue]
        except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, OSError) as e:
            raise ModelError(f"{where}: '{folder}' cannot be merged into the model: {e}") from e
    return model


def check_merges(run: RunFile, where: str) -> None:
    """Raises ModelError where adapters cannot be merged into the run's model, which is else found when it is loaded with some."""
    dtype = _dtype(run.model, _from(AutoConfig, run.model, locate(run.model.name)))
    if isinstance(dtype, torch.dtype):
        _refuse_narrow(dtype, where)


def _dtype(model: Model, config: PreTrainedConfig) -> Any:
    """Of the weights, as far as the config says it."""
    return config.dtype if model.dtype == "auto" else getattr(torch, model.dtype)


def _refuse_narrow(dtype: torch.dtype, where: str) -> None:
    if dtype.is_floating_point and dtype.itemsize < 4:
        raise ModelError(f"{where}: small updates are rounded away in weights of {dtype}; set model.dtype: float32")


@contextmanager
def _naming_fields(model: Model) -> Iterator[None]:
    """The field that is wrong where transformers does not know an implementation of attention or cannot use it here, or where the
    model has a head for other classes: it names an argument that a run file has not."""
    try:
        yield
    except ModelError as e:
        if model.attention and model.attention in str(e):
            raise ModelError(f"model.attention: {e}") from e
        if "ignore_mismatched_sizes" in str(e):
            raise ModelError(
                f"model.name: '{model.name}' has a head of another number of classes than this run; save it without the head, "
                f"AutoModel.from_pretrained({model.name!r}).save_pretrained(FOLDER), and its tokenizer, and name the folder"
            ) from e
        raise


def heads(model: PreTrainedModel) -> list[str]:
    """Everything outside the pretrained trunk. PEFT knows two names of heads; a head under another one stays random."""
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def keep(config: PeftConfig, train_in_full: list[str]) -> None:
    """Has PEFT train and save these modules in full, beside those that it does by itself."""
    by_itself = _HEADS_OF_PEFT.get(str(getattr(config.task_type, "value", config.task_type)), set())
    if more := [name for name in train_in_full if name not in by_itself]:
        setattr(config, "modules_to_save", [*(getattr(config, "modules_to_save", None) or []), *more])  # noqa: B010


def adapt(model: PreTrainedModel, config: PeftConfig, train_in_full: list[str], processor: Any) -> PeftModel:
    """The model with an adapter; whatever is trained is float32.

    Args:
        config: of the adapter; it is changed.
        train_in_full: modules that are trained beside it.

    Raises:
        ModelError: the method's config does not fit the model.
    """
    if train_in_full:
        # A classifier of texts reads the last token that is not padding; models of images have no such field.
        if getattr(model.config, "pad_token_id", 0) is None:
            model.config.pad_token_id = getattr(processor, "pad_token_id", None)
        keep(config, train_in_full)
    for field, absent in absent_names(config, model):
        raise ModelError(f"method.{field}: {absent_in_words(field, absent, model)}")
    try:
        check_fits(config, model, lambda: adapter_size(model, config))
        with torch.device("meta") if model.device.type == "meta" else nullcontext():  # a dry run has no memory for it
            adapted: PeftModel = get_peft_model(model, config)  # pyright: ignore[reportAssignmentType]
    except RankfoldError as e:  # ours say what there is instead
        raise ModelError(f"method: {e}") from e
    except (ValueError, TypeError, KeyError) as e:
        raise ModelError(f"method: {e}. Here are the {linear_layers_in_words(model)}") from e
    if not count(adapted).adapter:
        raise ModelError("method: it trains no parameter of this model; say in its fields what it is to train")
    train_in_float32(adapted, heads(model))
    return adapted


def adapter_size(model: nn.Module, config: PeftConfig) -> int:
    """How many parameters an adapter would train, counted without memory."""
    with torch.device("meta"):
        adapted: Any = get_peft_model(meta_copy(model), copy.deepcopy(config), autocast_adapter_dtype=False)  # pyright: ignore
    return count(adapted).adapter


def start_from(model: PeftModel, folder: Path, labels: list[str]) -> list[str]:
    """Puts the weights of an adapter folder, trained head included, into the model's new adapter.

    Args:
        labels: the run's classes in order of their index; empty where the task has none.

    Returns:
        Sentences for the reader.

    Raises:
        ModelError: no adapter folder, another method, other modules and shapes, or other classes.
    """
    where = f"training.start_from: '{folder}'"
    try:
        config, tensors = read_config(folder), read_tensors(folder)
    except (ValueError, FileNotFoundError) as e:
        raise ModelError(f"training.start_from: {e}") from e
    theirs, ours = (str(getattr(c.peft_type, "value", c.peft_type)) for c in (config, model.peft_config["default"]))
    if theirs != ours:
        raise ModelError(f"{where} is {theirs}, this run is {ours}; start from an adapter of the same method")
    notes = _check_labels(folder, labels, where) if labels else []
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = sorted(
        {k for k, v in tensors.items() if k not in own or own[k].shape != v.shape} | (own.keys() - tensors.keys())
    )
    if wrong:
        raise ModelError(f"{where} has other modules or shapes than this run ({len(wrong)} differ, {wrong[0]} is one)")
    set_peft_model_state_dict(model, tensors)
    return notes


def _check_labels(folder: Path, labels: list[str], where: str) -> list[str]:
    try:
        theirs = read_labels(folder)
    except RankfoldError as e:
        raise ModelError(f"{where}: {e}") from e
    if not theirs:
        return [f"{where} does not say which classes its head knows; those of this run are {', '.join(labels)}"]
    if theirs != labels:
        same = sorted(theirs) == sorted(labels)
        fix = f"set data.labels: {json.dumps(theirs)}" if same else "start from an adapter of the same classes"
        raise ModelError(
            f"{where} knows the classes {short(theirs)} in this order, this run has {short(labels)}; {fix}"
        )
    return []


def _from(auto: Any, model: Model, place: str, **options: Any) -> Any:
    options |= {"revision": model.revision} if model.revision else {}
    try:
        with reading(place):
            return auto.from_pretrained(place, trust_remote_code=model.trust_remote_code, **options)
    except ModelError as e:
        if place != model.name or Path(place).is_dir():
            raise ModelError(f"model.name: '{model.name}' cannot be read ({place}): {e}") from e
        raise ModelError(
            f"model.name: '{model.name}' is not a folder, a GGUF file or a bundled model"
            f"{nearest(model.name, bundled.MODELS, 'bundled')}; as a hub id it cannot be loaded: {e}"
        ) from e


def _reject_nan(model: PreTrainedModel, name: str) -> None:
    for key, weight in model.named_parameters():
        if (
            weight.is_floating_point()
            and not bool(torch.isfinite(weight.detach().sum()))
            and not bool(torch.isfinite(weight).all())
        ):
            raise ModelError(f"model.name: '{name}' holds NaN or infinite numbers in {key}; the file is damaged")
