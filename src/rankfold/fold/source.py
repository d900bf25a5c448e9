"""Where a fold comes from: what every source offers, and how adapter folders and bases are read."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    PretrainedConfig,
)

import rankfold.methods  # noqa: F401  (registers the methods with PEFT)
from rankfold.errors import RankfoldError
from rankfold.host import registry
from rankfold.host.adapter import Site, module_type
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
        adapted: names of the modules that have the adapter, as the base model knows them.
        sites: every linear module of a type that has the adapter, adapted or not, in the model's order.
        modules: every module name of the base model.
        heads: tensors of modules_to_save, by their name in the checkpoint.
        dtype: the base's.
        transposed: the base's weights are in × out (Conv1D).
        output_head: the adapted module that makes the logits, if there is one; no engine loads its LoRA.
        notes: what the user of the fold should know.
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
    notes: list[str] = field(default_factory=list)


def folding_device(tensor: Tensor) -> torch.device:
    """Where a fold computes: on the CPU; what has a shape and no numbers, as in a plan, stays where it is."""
    return tensor.device if tensor.is_meta else torch.device("cpu")


def output_head(base: nn.Module, adapted: Mapping[str, nn.Module]) -> str | None:
    """Which of the adapted modules makes the logits of a language model."""
    head = getattr(base, "get_output_embeddings", lambda: None)()
    return next((name for name, module in adapted.items() if module is head or name.endswith("lm_head")), None)


def of_adapted_types(sites: list[Site], adapted: list[str]) -> list[Site]:
    """Those of `sites` whose module type and shape has the adapter somewhere: TGI wants every layer of a type."""
    names = set(adapted)
    types = {_type(s) for s in sites if s.name in names}
    return [s for s in sites if _type(s) in types]


def _type(site: Site) -> tuple[str, int, int]:
    return module_type(site.name), site.out_features, site.in_features


def read_config(folder: Path) -> PeftConfig:
    """The config of an adapter folder.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is no adapter's, and where the adapter may be, or what is wrong with it.
    """
    folder = Path(folder)
    path = folder / "adapter_config.json"
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist; give the folder of an adapter")
    if folder.is_file():
        raise RankfoldError(f"{folder} is a file; give the folder that has it and its adapter_config.json")
    if not path.is_file():
        run = (folder / "adapter" / path.name).is_file()
        hint = f"; that of a run is in {folder / 'adapter'}" if run else ""
        raise RankfoldError(f"{folder} is not an adapter folder: it has no adapter_config.json{hint}")
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("peft_type")
    except (json.JSONDecodeError, AttributeError, UnicodeDecodeError) as error:
        raise RankfoldError(f"{path} is not valid: {error}") from None
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise RankfoldError(f"{path}: {registry.unknown_type(kind)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice about training
        return PeftConfig.from_pretrained(str(folder))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder; raises ValueError where the file is missing, truncated or a pickle."""
    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        pickled = Path(folder) / "adapter_model.bin"
        hint = " (only a pickled adapter_model.bin, which is never opened)" if pickled.exists() else ""
        raise RankfoldError(f"{folder} has no adapter_model.safetensors{hint}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RankfoldError(f"{path} cannot be read; it is truncated or not a safetensors file: {error}") from None


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


def base_config(name: str | None) -> PretrainedConfig:
    """The base model's config; raises ValueError where it cannot be had."""
    if not name:
        raise RankfoldError("the adapter's config does not name its base model; give it with --base FOLDER")
    if (Path(name).is_absolute() or name.startswith(".")) and not Path(name).exists():
        raise RankfoldError(
            f"base={name!r} does not exist, it may have been moved; give its new place with --base FOLDER"
        )
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RankfoldError(f"base={name!r}: its config.json cannot be read ({reason}); give --base FOLDER") from None


def base_skeleton(config: PeftConfig, base: str | None) -> nn.Module:
    """The base model on the meta device, from its config alone; raises ValueError where that cannot be had."""
    found, made = base_config(base or config.base_model_name_or_path), base_class(config)
    with torch.device("meta"):
        return made.from_config(found) if hasattr(made, "from_config") else made(found)


def base_class(config: PeftConfig) -> Any:
    """The class to load the base model with: of the adapter's task, else what it was trained on, else the bare model."""
    task = table.of_peft_type(config.task_type)
    named = (config.auto_mapping or {}).get("base_model_class")
    return getattr(transformers, task.models[0] if task else named or "", None) or AutoModel
