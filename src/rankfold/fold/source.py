"""Where a fold comes from: a live model, or an adapter folder put on a weightless copy of its base."""

from __future__ import annotations

import json
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

import rankfold.methods  # noqa: F401  (registers the methods with PEFT)
from rankfold import registry
from rankfold.adapter import Site, module_type
from rankfold.config import LowRankConfig
from rankfold.factors import Factors
from rankfold.layer import AdaptedLinear
from rankfold.tuner import LAYERS, SHARED, site_of

AUTO = {"CAUSAL_LM": AutoModelForCausalLM, "SEQ_CLS": AutoModelForSequenceClassification}


@dataclass(frozen=True)
class Source:
    """One adapter, ready to be folded.

    Args:
        config: its config.
        layers: by module name as the base model knows it, those that have the adapter.
        sites: every linear module of a type that has the adapter, adapted or not, in the model's order.
        modules: every module name of the base model.
        heads: tensors of modules_to_save, by their name in the checkpoint.
        dtype: the base's.
    """

    config: LowRankConfig
    adapter_name: str
    layers: dict[str, AdaptedLinear]
    sites: list[Site]
    modules: list[str]
    heads: dict[str, Tensor]
    dtype: torch.dtype
    transposed: bool

    def factors(self, name: str) -> Factors | None:
        """The trained update of one module in float64, gate and scale baked in and dead components left out; None
        where the module has no adapter."""
        if name not in self.layers:
            return None
        adapter = self.layers[name].adapters([self.adapter_name])[0]
        factors = adapter.factors().detach().to("cpu", torch.float64).balanced()
        return factors.select(factors.up.norm(dim=0) > 0)


def from_model(model: nn.Module, adapter_name: str = "default", heads: dict[str, Tensor] | None = None) -> Source:
    """Reads a live model, PeftModel or injected.

    Raises:
        ValueError: no adapter of that name.
        TypeError: an adapter that is not rankfold's, or whose update is not a fixed matrix.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is None:
        raise ValueError(f"adapter_name={adapter_name!r}: the model has {sorted(getattr(model, 'peft_config', {}))}")
    config = _check_foldable(config)
    layers, sites, modules = {}, [], []
    for name, module in base.named_modules():
        if f".{LAYERS}." in f".{name}." or name.startswith(SHARED) or name.endswith(".base_layer"):
            continue
        modules.append(name)
        if isinstance(module, AdaptedLinear) and adapter_name in module.lowrank_adapters:
            layers[name] = module
        if isinstance(module, (AdaptedLinear, nn.Linear, Conv1D)):
            sites.append(site_of(name, module))
    types = {_type(s) for s in sites if s.name in layers}
    first = next(iter(layers.values())).get_base_layer()
    return Source(
        config=config,
        adapter_name=adapter_name,
        layers=layers,
        sites=[s for s in sites if _type(s) in types],
        modules=modules,
        heads=_heads(model, adapter_name) if heads is None else heads,
        dtype=getattr(base, "dtype", first.weight.dtype),
        transposed=any(layer.transposed for layer in layers.values()),
    )


def from_folder(folder: Path, base: str | None = None) -> Source:
    """Reads an adapter folder; of the base only its config.json is needed, no weights.

    Args:
        folder: what `save_pretrained` wrote.
        base: folder or hub id of the base model, if not the one in the adapter's config.

    Raises:
        ValueError: a folder that is not an adapter, tensors that are truncated, foreign or not finite.
        TypeError: an adapter that is not rankfold's.
    """
    config = _check_foldable(read_config(folder))
    tensors = read_tensors(folder)
    ours = {k: v for k, v in tensors.items() if f".{LAYERS}." in k or f".{SHARED}." in k}
    skeleton = base_skeleton(config, base)
    bare: LowRankConfig = copy(config)
    # The head is copied as it is; leaving it out here makes the number of labels irrelevant
    bare.modules_to_save, bare.task_type, bare.inference_mode = None, None, True
    bare.base_model_name_or_path = None  # PEFT warns when a base moves
    model = get_peft_model(skeleton, bare, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
    # PEFT's own loader would move the tensors to the base's device, which is meta
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[bare.peft_type]  # pyright: ignore[reportArgumentType]
    renamed = tuner._remap_adapter_state_dict_for_load(model, bare, "default", ours)
    model.load_state_dict(renamed, strict=False, assign=True)
    source = from_model(model, heads={k: v for k, v in tensors.items() if k not in ours})
    return Source(
        **{**vars(source), "config": config, "dtype": getattr(skeleton.config, "dtype", None) or torch.float32}
    )


def read_config(folder: Path) -> PeftConfig:
    """The config of an adapter folder; raises ValueError that says what is wrong with it."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not an adapter folder: it has no adapter_config.json")
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("peft_type")
    except (json.JSONDecodeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid: {error}") from None
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"{path}: peft_type={kind!r} is not known to PEFT or rankfold")
    return PeftConfig.from_pretrained(str(folder))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder; raises ValueError where the file is missing, truncated or a pickle."""
    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        pickled = Path(folder) / "adapter_model.bin"
        hint = " (only a pickled adapter_model.bin, which is never opened)" if pickled.exists() else ""
        raise ValueError(f"{folder} has no adapter_model.safetensors{hint}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read; it is truncated or not a safetensors file: {error}") from None


def base_skeleton(config: PeftConfig, base: str | None) -> nn.Module:
    """The base model on the meta device, from its config alone; raises ValueError where that cannot be had."""
    name = base or config.base_model_name_or_path
    if not name:
        raise ValueError("the adapter's config does not name its base model; give it with --base FOLDER")
    try:
        base_config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"base={name!r}: its config.json cannot be read ({reason}); give --base FOLDER") from None
    auto = AUTO.get(str(getattr(config.task_type, "value", config.task_type)))
    if auto is None and config.auto_mapping:
        model_cls = getattr(transformers, config.auto_mapping["base_model_class"], None)
        if model_cls is not None:
            with torch.device("meta"):
                return model_cls(base_config)
    with torch.device("meta"):
        return (auto or AutoModel).from_config(base_config)


def _type(site: Site) -> tuple[str, int, int]:
    return module_type(site.name), site.out_features, site.in_features


def _check_foldable(config: PeftConfig) -> LowRankConfig:
    if not isinstance(config, LowRankConfig):
        raise TypeError(
            f"peft_type={getattr(config.peft_type, 'value', config.peft_type)} is not one of rankfold's methods; "
            "this version folds its own adapters only"
        )
    method = registry.get(config.method)
    if not method.foldable:
        raise TypeError(
            f"{method.title}: its update depends on the input, so no LoRA equals it; merge or serve it live"
        )
    if method.controller is not None and not config.schedule and not config.allow_unscheduled:
        raise ValueError(
            f"this {config.method} adapter was saved without its schedule having run, so its ranks were never chosen; "
            "train it with rankfold.attach or AdapterCallback, or set allow_unscheduled in its config"
        )
    return config


def _heads(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {k: v for k, v in saved.items() if f".{LAYERS}." not in k and f"{SHARED}." not in k}
