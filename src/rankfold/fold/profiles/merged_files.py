"""What lies beside the weights of a merged model: the base's own config with what the merge changed, its tensors' own names,
tokenizer, chat template and processors.

The base's config.json is kept, and a base that has only the keys of transformers 5 gets the old ones beside them (io/old_keys.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers.utils.hub import cached_file

from rankfold.errors import RankfoldError
from rankfold.io.files import to_json
from rankfold.io.models import model_config
from rankfold.io.old_keys import with_old_keys
from rankfold.io.weights import INDEX, read_metadata, weight_files

#: What makes a vocabulary. An adapter that has any of them brings its whole tokenizer.
VOCABULARY = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "bpe.model",
    "bpe.codes",
    "dict.txt",
    "vocab.json",
    "vocab.txt",
    "vocab.model",
    "merges.txt",
)
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TEMPLATES = ("chat_template.jinja", "chat_template.json")
#: Processors, generation settings, and what sentence-transformers wants.
OTHERS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
    "feature_extractor_config.json",
    "audio_tokenizer_config.json",
    "generation_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)

#: Differs between any two configs and says nothing of the model.
_VOLATILE = {"_name_or_path", "transformers_version", "auto_map"}


def write_config(base: str, revision: str | None, folder: Path) -> list[str]:
    """Puts the base's config.json, with what the merge changed and with the old keys, in place of transformers'.

    Args:
        folder: of the merged model, whose config.json is transformers'.

    Returns:
        Notes, where that config does not read as the same model and transformers' own was left.
    """
    path = folder / "config.json"
    written, after = json.loads(path.read_text(encoding="utf-8")), _plain(model_config(folder).to_dict())
    kept = json.loads(Path(_file(base, "config.json", revision) or path).read_text(encoding="utf-8"))
    before = _plain(model_config(base, **({"revision": revision} if revision else {})).to_dict())
    kept = {key: value for key, value in _changed(kept, before, after).items() if key not in _VOLATILE}
    kept |= {key: written[key] for key in ("architectures", "transformers_version") if key in written}
    for found in (with_old_keys(kept), with_old_keys(kept, scaling=False), with_old_keys(written), kept):
        path.write_text(to_json(found), encoding="utf-8")
        if _same(_plain(model_config(folder).to_dict()), after):
            return []
    path.write_text(to_json(written), encoding="utf-8")
    return [
        "config.json is as transformers writes it; engines that read older keys (rope_theta) may take defaults instead"
    ]


def _changed(kept: dict[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The base's config as it stands in its file, with the values that differ between the two models."""
    found = dict(kept)
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        if old == new or key in _VOLATILE:
            continue
        if (
            isinstance(old, Mapping)
            and isinstance(new, Mapping)
            and isinstance(kept.get(key), dict)
            and key.endswith("_config")
        ):
            found[key] = _changed(kept[key], old, new)
        elif key not in after:
            found.pop(key, None)
        else:
            found[key] = new
            if key == "dtype" and "torch_dtype" in found:
                found["torch_dtype"] = new
    return found


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has it: class indices are strings there."""
    return json.loads(json.dumps(config, default=str))


def _same(one: Any, other: Any) -> bool:
    """Equal in all that `other` has; old keys that a config class keeps as they are do not count."""
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_same(one.get(key), value) for key, value in other.items() if key not in _VOLATILE)
    return one == other


# --- tensors ------------------------------------------------------------------------------------------------------------


def restore_names(base: Mapping[str, Any], folder: Path, prefix: str) -> list[str]:
    """Gives the tensors the names of the base's files, which may lack the model's prefix or have it; says which are others.

    Args:
        base: the names in the base's files.
        prefix: the model's `base_model_prefix`.
    """
    files = weight_files(folder)
    names = {name: _as_in(base, name, prefix) for name in files}
    if len(set(names.values())) == len(names) and any(new != old for old, new in names.items()):
        for file in set(files.values()):
            tensors = {names[name]: tensor for name, tensor in load_file(file).items()}
            save_file(tensors, file, metadata=read_metadata(file) or {"format": "pt"})
        if (index := folder / INDEX).is_file():
            content = json.loads(index.read_text(encoding="utf-8"))
            content["weight_map"] = {names[name]: file for name, file in content["weight_map"].items()}
            index.write_text(to_json(content), encoding="utf-8")
    lost = sorted(set(base) - set(weight_files(folder)))
    strange = sorted(set(weight_files(folder)) - set(base))
    if not lost or not strange:
        return []  # a new head, or copies of what is tied
    return [
        f"transformers names {len(strange)} tensors other than the base's files do ({strange[0]}, not {lost[0]}); an engine that "
        "reads the base's own names may not find them"
    ]


def _as_in(base: Mapping[str, Any], name: str, prefix: str) -> str:
    if name in base or not prefix:
        return name
    return next((n for n in (name.removeprefix(f"{prefix}."), f"{prefix}.{name}") if n in base), name)


# --- tokenizer and processors -------------------------------------------------------------------------------------------


def copy_files(base: str, revision: str | None, adapter: Path | None, folder: Path) -> list[str]:
    """Copies what belongs to the model; the adapter's own tokenizer and chat template win over the base's.

    The files are copied: transformers 5 makes an empty tokenizer of some types where there is none to load.
    """
    here = _own(adapter)
    ours = [n for n in (*VOCABULARY, *SETTINGS, *TEMPLATES, *OTHERS) if n in here]
    theirs = [*OTHERS]
    if not any(n in VOCABULARY for n in ours):
        theirs += [*VOCABULARY, *SETTINGS]
    if not (any(n in TEMPLATES for n in ours) or _has_template(here.get("tokenizer_config.json"))):
        theirs += TEMPLATES
    found = {name: path for name in theirs if (path := _file(base, name, revision))}
    for name, path in {**found, **{name: here[name] for name in ours}}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(path, folder / name)
    notes = []
    taken = [n for n in ours if n not in OTHERS]
    if taken:
        notes.append(f"the adapter's own {', '.join(taken)} took the place of the base's")
    if not any((folder / name).is_file() for name in (*VOCABULARY, *SETTINGS)):
        notes.append("no tokenizer was found beside the base; add its files before serving")
    return notes


def _own(adapter: Path | None) -> dict[str, Path]:
    """The files of an adapter's folder; an adapter of a run shares it with nothing else."""
    if adapter is None:
        return {}
    return {n: adapter / n for n in (*VOCABULARY, *SETTINGS, *TEMPLATES, *OTHERS) if (adapter / n).is_file()}


def _has_template(settings: Path | None) -> bool:
    if settings is None:
        return False
    try:
        return bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))
    except (ValueError, AttributeError, OSError) as error:
        raise RankfoldError(f"{settings} is not valid: {error}; mend or remove it") from None


def _file(base: str, name: str, revision: str | None) -> str | None:
    quietly = {f"_raise_exceptions_for_{w}": False for w in ("missing_entries", "connection_errors", "gated_repo")}
    return cached_file(base, name, revision=revision, **quietly)
