"""Weights in an ONNX file, read without the package onnx: the few fields of its protocol buffers that hold them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Numbers of fields in onnx.proto.
_GRAPH, _NODE, _TENSOR = 7, 1, 5
_INPUT, _OUTPUT, _OPERATION = 1, 2, 4
_DIMENSIONS, _TYPE, _NAME, _DATA = 1, 2, 8, 9
_FLOAT = 1


def read_onnx(path: Path) -> dict[str, Tensor]:
    """The float32 tensors of an ONNX file whose data lie inside it, by name.

    What a MatMul multiplies by has no name of its own in exported models; it gets that of the bias that is added behind it, with
    `weight` for `bias`, and is turned to out × in.
    """
    content = memoryview(bytearray(path.read_bytes()))  # writable, as torch wants it
    tensors: dict[str, Tensor] = {}
    products: dict[str, str] = {}  # output of a MatMul → the tensor that it multiplies by
    for number, value in _fields(dict(_fields(content))[_GRAPH]):
        if number == _TENSOR:
            fields = list(_fields(value))
            found = dict(fields)
            if found.get(_TYPE) == _FLOAT and len(found.get(_DATA, b"")):
                shape = [size for field, part in fields if field == _DIMENSIONS for size in _whole_numbers(part)]
                tensors[_text(found[_NAME])] = torch.frombuffer(found[_DATA], dtype=torch.float32).view(shape)
    for number, value in _fields(dict(_fields(content))[_GRAPH]):
        if number == _NODE:
            fields = list(_fields(value))
            found, inputs = dict(fields), [_text(part) for field, part in fields if field == _INPUT]
            known = next((name for name in inputs if name in tensors), None)
            if known and _text(found[_OPERATION]) == "MatMul":
                products[_text(found[_OUTPUT])] = known
            elif known and (factor := next((products[name] for name in inputs if name in products), None)):
                tensors[known.removesuffix("bias") + "weight"] = tensors.pop(factor).T.contiguous()
    return tensors


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Number and value of each field: whole numbers, else bytes."""
    at = 0
    while at < len(message):
        key, at = _whole_number(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _whole_number(message, at)
        else:
            length, at = _whole_number(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = message[at : at + length], at + length
        yield key >> 3, value


def _whole_number(message: memoryview, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _whole_numbers(part: Any) -> Iterator[int]:
    """One number, or many packed as bytes."""
    if isinstance(part, int):
        yield part
        return
    at = 0
    while at < len(part):
        value, at = _whole_number(part, at)
        yield value


def _text(part: memoryview) -> str:
    return bytes(part).decode("utf-8")
