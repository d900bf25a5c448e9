"""LoRA files of diffusers and of kohya's scripts: one .safetensors that may hold LoRAs of several models.

diffusers' keys are `unet.MODULE.lora_A.weight`, older ones end in `lora.down.weight` or `lora_linear_layer.down.weight`; kohya's are
`lora_unet_MODULE.lora_down.weight` with underscores for the module's dots, which only the base's own names tell apart.
A module's scale is its `.alpha` over its rank, and 1 without one (diffusers 0.42 `get_peft_kwargs`, kohya's networks/lora.py); or
what PEFT makes of the config that newer files carry.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn

from rankfold.errors import RankfoldError
from rankfold.host.peft_api import patterns_of_moved
from rankfold.io.adapters import CONFIG, WEIGHTS, read_tensors
from rankfold.io.formats.adapter import Pair, SavedAdapter, plain_lora
from rankfold.io.formats.place import Place
from rankfold.io.models import ModelError, model_config, skeleton
from rankfold.io.weight_names import to_model
from rankfold.io.weights import read_headers, read_metadata
from rankfold.text import examples, first_line

_FACTOR = re.compile(r"(?P<module>.+)\.(?:lora_|lora\.|lora_linear_layer\.)(?P<side>A|B|down|up)(?:\.weight)?")
_ALPHA = re.compile(r"(?P<module>.+)\.(?P<side>alpha)")
#: Kohya's and LyCORIS' names of the model that a module is in.
_KOHYA = re.compile(r"(lora_[a-z0-9]+|lycoris)_(.+)")
_SIDES = {"A": "down", "B": "up"}
METADATA = "lora_adapter_metadata"

#: By model ("unet", "lora_te"), by module: "down", "up" and "alpha".
Models = dict[str, dict[str, dict[str, Tensor]]]


def read(place: Place, base: str | None) -> SavedAdapter:
    """The LoRA of one model by that model's names.

    Raises:
        RankfoldError: tensors that are not a LoRA's, several models or kohya's names without `base`, or a base without the modules.
    """
    path = place.weights
    assert path is not None
    models = _sorted(read_tensors(path), path)
    if "model" in models:
        raise RankfoldError(
            f"{path}: names such as model.{next(iter(models['model']))} are of a language model and not of diffusers; if PEFT wrote "
            f"them, call it {WEIGHTS} and put it beside its {CONFIG}, which says the scale"
        )
    names = {} if base is None else _module_names(base)
    model = _only_model(models, path) if base is None else _model_of(models, names, base, path)
    found = {names.get(module, module): parts for module, parts in models[model].items()}
    pairs = {module: _pair(module, parts, path) for module, parts in found.items()}
    notes = [f"read as the LoRA of {model} in a file of {'kohya' if _is_kohya(model) else 'diffusers'}"]
    if others := [other for other in models if other != model]:
        notes.append(f"left out: the LoRAs of {', '.join(others)}, which are other models; fold each with its --base")
    read = plain_lora(path, pairs, base, notes)
    stated = _stated(path, model)
    moved = {module: names[module] for module in models[model] if names.get(module, module) != module}
    return read if stated is None else replace(read, config=_with(stated, read.config, path, moved))


def _is_kohya(model: str) -> bool:
    return model.startswith("lora_") or model == "lycoris"


def _sorted(tensors: dict[str, Tensor], path: Path) -> Models:
    models: Models = defaultdict(lambda: defaultdict(dict))
    odd = []
    for key, tensor in tensors.items():
        found = _FACTOR.fullmatch(key) or _ALPHA.fullmatch(key)
        if found is None:
            odd.append(key)
            continue
        model, dot, module = found["module"].partition(".")
        if not dot and (kohya := _KOHYA.fullmatch(model)):
            model, module = kohya[1], kohya[2]
        if not module:
            odd.append(key)
            continue
        models[model][module][_SIDES.get(found["side"], found["side"])] = tensor
    if odd or not models:
        kind = next(
            (w for w in ("hada_", "lokr_", "dora_scale", "lora_magnitude", "lora_mid") if any(w in k for k in odd)), ""
        )
        raise RankfoldError(
            f"{path}: tensors that are not of a plain LoRA{kind and f' ({kind})'}: {examples(odd or ['none at all'])}; merge it into its base "
            "with the tool that made it"
        )
    return models


def _pair(module: str, parts: dict[str, Tensor], path: Path) -> Pair:
    down, up, alpha = (parts.get(part) for part in ("down", "up", "alpha"))
    if down is None or up is None:
        raise RankfoldError(
            f"{path}: {module} has {', '.join(parts)} and lacks the other factor; the file is incomplete"
        )
    if alpha is not None and alpha.numel() != 1:
        raise RankfoldError(f"{path}: the alpha of {module} has the shape {tuple(alpha.shape)}; it must be one number")
    return Pair(down, up, None if alpha is None else float(alpha) or None)  # kohya counts an alpha of 0 as none


def _module_names(base: str) -> dict[str, str]:
    """The modules of a model that have weights, by their names with and without underscores for dots, older names too."""
    folder = Path(base)
    if (folder / "model_index.json").is_file():
        raise RankfoldError(
            f"base={base!r} is a pipeline of several models; give one of them, such as {folder / 'unet'}"
        )
    try:
        model: nn.Module = skeleton(model_config(base))
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    except ModelError as error:  # a model of diffusers: its files have its own names
        model = nn.Module()
        names = [name for file in sorted(folder.glob("*.safetensors")) for name in read_headers(file)]
        if not names:
            raise RankfoldError(
                f"base={base!r}: {error}, and it has no safetensors whose names could be read"
            ) from None
    modules = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    name_of = to_model(model, prefix=False)
    # In transformers 5 a CLIPTextModel lost the part in front that every other tool's names of its modules have
    once = {old: m for m in modules if name_of(f"{(old := f'text_model.{m}')}.weight")[0] == f"{m}.weight"}
    known = {module: module for module in modules} | once
    flat: dict[str, str] = {}
    for name, module in known.items():
        if (other := flat.setdefault(name.replace(".", "_"), module)) != module:
            raise RankfoldError(f"base={base!r}: kohya's names do not tell its modules {other} and {module} apart")
    return flat | known


def _only_model(models: Models, path: Path) -> str:
    """The one model of a file whose names need no base."""
    model, *others = models
    if not others and not _is_kohya(model):
        return model
    what = (
        f"it holds LoRAs of {len(models)} models ({', '.join(models)}), and a fold is of one"
        if others
        else f"kohya's names, such as {next(iter(models[model]))}, do not say where the module's name has dots"
    )
    raise RankfoldError(f"{path}: {what}; give the folder of the model that it was trained on with --base FOLDER")


def _model_of(models: Models, names: dict[str, str], base: str, path: Path) -> str:
    """Which of the file's models has all its modules in the base."""
    missing = {model: [m for m in modules if m not in names] for model, modules in models.items()}
    fitting = [model for model, lost in missing.items() if not lost]
    if len(fitting) == 1:
        return fitting[0]
    model, lost = min(missing.items(), key=lambda found: len(found[1]))
    what = (
        f"{' and '.join(fitting)} fit base={base!r} alike"
        if fitting
        else f"base={base!r} lacks {len(lost)} of the {len(models[model])} modules of {model}, such as {lost[0]}"
    )
    raise RankfoldError(f"{path}: {what}; give the folder of the model that it was trained on with --base FOLDER")


def _stated(path: Path, model: str) -> dict[str, Any] | None:
    """PEFT's config of a model's LoRA, where diffusers wrote it into the file."""
    try:
        whole = json.loads(read_metadata(path).get(METADATA, "null"))
        return (
            whole and {k.removeprefix(f"{model}."): v for k, v in whole.items() if k.startswith(f"{model}.")}
        ) or None
    except (ValueError, AttributeError) as error:
        raise RankfoldError(f"{path}: its {METADATA} is not valid: {error}") from None


def _with(stated: dict[str, Any], config: Any, path: Path, moved: dict[str, str]) -> LoraConfig:
    """The stated ranks and scales on the modules that were found, some under other names."""
    keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias")
    try:
        made = LoraConfig(
            **{key: stated[key] for key in keys if key in stated},
            target_modules=config.target_modules,
            base_model_name_or_path=config.base_model_name_or_path,
            inference_mode=True,
        )
        made.rank_pattern = patterns_of_moved(moved, made.rank_pattern or {}, made.r)
        made.alpha_pattern = patterns_of_moved(moved, made.alpha_pattern or {}, made.lora_alpha)
        return made
    except (TypeError, ValueError) as error:
        raise RankfoldError(f"{path}: its {METADATA} is not a config of PEFT's: {first_line(error)}") from None
