"""The header of a GGUF file: metadata and tensors, read with every length checked against the file's end.

Our own few lines and not the `gguf` package, which is an optional extra and trusts the counts that a damaged file states.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfold.errors import RankfoldError

#: GGUF's scalar types of metadata, by number; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
#: Tensor types whose numbers can be looked at, and their size.
_FLOATS = {0: ("F32", torch.float32, 4), 1: ("F16", torch.float16, 2), 30: ("BF16", torch.bfloat16, 2)}
_LARGEST = 1 << 20  # entries of an array or header; real adapters have thousands


@dataclass(frozen=True)
class GgufTensor:
    """One tensor; `shape` is torch's order, that is GGUF's reversed."""

    shape: tuple[int, ...]
    dtype: str
    start: int


@dataclass(frozen=True)
class GgufHeader:
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Reader:
    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def scalar(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        if self.at + size > len(self.data):
            raise RankfoldError(f"it ends inside its header, at byte {len(self.data)}")
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += size
        return value

    def text(self) -> str:
        size = self.scalar("Q")
        if self.at + size > len(self.data):
            raise RankfoldError(f"a name of {size} bytes reaches beyond its end")
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8", "replace")

    def count(self, what: str) -> int:
        number = self.scalar("Q")
        if number > _LARGEST:
            raise RankfoldError(f"it claims {number} {what}")
        return number

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == 8:
            return self.text()
        if kind == 9 and depth < 4:
            inner = self.scalar("I")
            return [self.value(inner, depth + 1) for _ in range(self.count("entries in one array"))]
        if kind not in _SCALARS:
            raise RankfoldError(f"metadata of the unknown type {kind}")
        return self.scalar(_SCALARS[kind])


def read_header(path: Path) -> GgufHeader:
    """Metadata and tensors.

    Raises:
        ValueError: truncated, or not GGUF.
        OSError: as opening does.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data)
        if data[:4] != b"GGUF":
            raise RankfoldError("it does not start with GGUF")
        reader.at = 4
        version = reader.scalar("I")
        if version not in (2, 3):
            raise RankfoldError(f"GGUF version {version}, not 2 or 3")
        n_tensors, n_keys = reader.count("tensors"), reader.count("keys")
        metadata = {reader.text(): reader.value(reader.scalar("I")) for _ in range(n_keys)}
        found = {}
        for _ in range(n_tensors):
            name, dims = reader.text(), reader.scalar("I")
            if dims > 4:
                raise RankfoldError(f"tensor {name!r} with {dims} dimensions")
            shape = tuple(reader.scalar("Q") for _ in range(dims))[::-1]
            found[name] = (shape, reader.scalar("I"), reader.scalar("Q"))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 16:
            raise RankfoldError(f"general.alignment={alignment!r}")
        data_start = -(-reader.at // alignment) * alignment
        tensors = {}
        for name, (shape, kind, offset) in found.items():
            dtype, _, size = _FLOATS.get(kind, (f"quantised ({kind})", None, 0))
            start = data_start + offset
            if start + size * _numel(shape) > len(data):
                raise RankfoldError(f"it is truncated: tensor {name!r} reaches beyond its end")
            tensors[name] = GgufTensor(shape, dtype, start)
        return GgufHeader(metadata, tensors)


def read_tensor(path: Path, tensor: GgufTensor) -> Tensor | None:
    """Its numbers; None where they are quantised."""
    kind = next((t for name, t, _ in _FLOATS.values() if name == tensor.dtype), None)
    if kind is None or not _numel(tensor.shape):
        return None
    return torch.from_file(
        str(path), shared=False, size=_end(tensor, kind), dtype=torch.uint8
    )[tensor.start :].clone().view(kind).reshape(tensor.shape)  # fmt: skip


def _end(tensor: GgufTensor, kind: torch.dtype) -> int:
    return tensor.start + _numel(tensor.shape) * kind.itemsize


def _numel(shape: tuple[int, ...]) -> int:
    n = 1
    for d in shape:
        n *= d
    return n
