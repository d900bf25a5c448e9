"""Base models: where a name points, their config, a copy without weights, and the model with them. Never runs remote code."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from rankfold.errors import RankfoldError
from rankfold.io import assets as bundled
from rankfold.io.gguf_models import load_gguf_folder
from rankfold.text import first_line, one_line, short_repr

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class ModelError(RankfoldError):
    """The model cannot be found, read or adapted; the message names it and the fix."""


def locate(name: str) -> str:
    """What `from_pretrained` takes for a model's name: a folder, or a hub id as it is.

    Raises:
        ModelError: a file or folder that is not a model.
    """
    if name in bundled.MODELS:
        return str(bundled.model_path(name))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return str(load_gguf_folder(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model.name: the folder '{name}' has no config.json, so it is not a saved model")
        return str(path)
    if path.is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"model.name: '{name}' is neither a folder with a saved model nor a GGUF file")
    return name


def model_config(place: str | Path, **options: Any) -> PretrainedConfig:
    """The config of a folder or hub id, or from the header of a GGUF file.

    Args:
        options: of `AutoConfig.from_pretrained`.

    Raises:
        ModelError: it cannot be read, and why.
    """
    path = Path(place).expanduser()
    if path.suffix == ".gguf" and path.is_file():  # transformers reads no tensor for this
        place, options = path.parent, {**options, "gguf_file": path.name, "local_files_only": True}
    with reading(path):
        try:
            return AutoConfig.from_pretrained(place, **{"trust_remote_code": False, **options})
        except ValueError as error:
            if "trust_remote_code" in str(error):
                raise ModelError("it needs code of its own, which is never run here") from error
            raise


@contextmanager
def reading(place: str | Path) -> Iterator[None]:
    """Whatever transformers raises on what a model's folder holds, as a ModelError that says why."""
    content = _content(Path(place).expanduser() / "config.json")
    classes = content.get("architectures")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise ModelError(f"architectures={short_repr(classes)} must be a list of names")
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # transformers, and what checks the fields of its configs, raise anything on a value
        zero = next((f"{key}={content[key]}" for key in _SIZES if content.get(key) == 0), None)
        raise ModelError(f"{zero} must be a positive number" if zero else _reason(error)) from error


#: Of a config, numbers that others are divided by or that shapes are made of.
_SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")


def _content(path: Path) -> dict[str, Any]:
    """Of a local config.json; {} where there is none, or none that is JSON, which transformers says.

    Raises:
        ModelError: it is not an object, which transformers takes for an unknown model.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        raise ModelError(f"it holds {short_repr(content)} where an object is expected")
    return content


def _reason(error: BaseException | None) -> str:
    """What transformers says: the first sentence, or all of what a check of a field says, which names the value at its end."""
    return one_line(error) if "alidation error" in str(error) else first_line(error)


def named_class(name: str | None) -> Any:
    """The class of transformers of this name, one of its Auto classes or a model's; the bare AutoModel where it has none."""
    named = getattr(transformers, name or "", None)
    auto = isinstance(named, type) and hasattr(named, "from_config")
    return named if auto or (isinstance(named, type) and issubclass(named, PreTrainedModel)) else AutoModel


def skeleton(
    config: PretrainedConfig, makers: Sequence[Any] = (), *, dtype: torch.dtype | str | None = None, **options: Any
) -> PreTrainedModel:
    """The model of a config on the meta device: shapes, names and types, without weights.

    Args:
        makers: classes of transformers, of which the first that has a model for the config is taken; by default the class
            that the config says it was saved from.
        dtype: of its floating-point weights; by default the config's.
        options: of the class's `from_config`.

    Raises:
        ModelError: none of the classes can make a model of the config.
    """
    makers = makers or [named_class(next(iter(config.architectures or []), None))]
    dtype = dtype or getattr(config, "dtype", None)
    last: Exception | None = None
    for maker in makers:
        auto = hasattr(maker, "from_config")
        build = maker.from_config if auto else maker._from_config
        more = {"trust_remote_code": False, **options} if auto else options
        try:
            with torch.device("meta"):
                return build(config, dtype=dtype if dtype in _DTYPES else torch.float32, **more)
        except Exception as error:  # an Auto class refuses a config that is not in its table; another one may have it
            last = error
    if "Unrecognized configuration class" in str(last):
        names = " or ".join(maker.__name__ for maker in makers)
        raise ModelError(f"transformers has no {names} of a {config.model_type}") from last
    raise ModelError(f"its config ({config.model_type}) cannot be used: {_reason(last)}") from last


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The table of a model's tokens; None where it has none, as a speech model."""
    try:
        return getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return None


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy whose tensors have shapes only; what was tied stays tied."""
    hollow: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    hollow |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    return copy.deepcopy(model, hollow)


def load_base(
    maker: Any,
    place: str | Path | None,
    dtype: torch.dtype | str,
    labels: int | None = None,
    revision: str | None = None,
) -> Any:
    """A base model with its weights.

    Args:
        maker: class of transformers, as `named_class` gives it.
        place: folder or hub id.
        dtype: of the weights; "auto" keeps the file's.
        labels: outputs of a classification head, whose own weights may be missing.
        revision: of a hub id.

    Raises:
        OSError, ValueError: the weights cannot be had.
    """
    extra = {} if labels is None else {"num_labels": labels, "ignore_mismatched_sizes": True}
    extra |= {"revision": revision} if revision else {}
    with quiet():  # a head that is loaded a line later needs no warning
        return maker.from_pretrained(place, dtype=dtype, trust_remote_code=False, **extra)


@contextmanager
def quiet() -> Iterator[None]:
    """Neither warnings nor bars of transformers."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
