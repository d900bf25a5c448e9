"""Folders that PEFT writes, for rankfold's methods and its own."""

from __future__ import annotations

from rankfold.errors import RankfoldError
from rankfold.io.adapters import CONFIG, PICKLED, WEIGHTS, read_config, read_tensors
from rankfold.io.formats.adapter import SavedAdapter
from rankfold.io.formats.config_keys import check_keys
from rankfold.io.formats.place import Place
from rankfold.io.weights import read_headers


def read(place: Place, base: str | None) -> SavedAdapter:
    """The folder as it is; raises RankfoldError for one that is damaged, or whose config has keys that may change the update."""
    if place.weights is not None and place.weights.name not in (WEIGHTS, PICKLED):
        wanted = WEIGHTS if place.weights.suffix == ".safetensors" else PICKLED
        raise RankfoldError(
            f"{place.weights}: PEFT reads no weights of this name; call it {wanted}, and put its {CONFIG} beside it"
        )
    config = read_config(place.folder)
    tensors = read_tensors(place.weights or place.folder)
    return SavedAdapter(place.folder, config, tensors, [*_widened(place), *check_keys(place.folder, config)])


def _widened(place: Place) -> list[str]:
    if place.weights is None or place.weights.suffix != ".safetensors":
        return []
    narrow = sorted({h.dtype for h in read_headers(place.weights).values() if h.dtype.startswith("F8")})
    return [f"the adapter is stored in {', '.join(narrow)}; the error is that of the fold alone"] if narrow else []
