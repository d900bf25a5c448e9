"""Facts of a base model, from its shapes and config: parameters, bytes, operations, and what cannot be adapted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from rankfold.plan.flops import base_flops
from rankfold.plan.layers import in_and_out


@dataclass(frozen=True)
class BaseFacts:
    """A base model.

    Args:
        architecture: its class.
        parameters: tied ones count once.
        bytes: of its weights as they lie in memory, or None where the quantisation's layout is not known here.
        quantised: how, or None.
        flops: of one token, forward (flops.py says what is counted).
    """

    architecture: str
    parameters: int
    bytes: int | None
    quantised: str | None
    flops: int
    notes: list[str] = field(default_factory=list)


def describe(model: nn.Module) -> BaseFacts:
    """The facts of a model from `meta_model`, whose linear layers are plain even where its config says how they are quantised."""
    parameters = {id(p): p for p in model.parameters()}.values()
    total = sum(p.numel() for p in parameters)
    plain = sum(p.numel() * p.element_size() for p in parameters)
    quantised = _quantisation(model)
    size: int | None = plain
    how, notes = None, []
    if quantised:
        how = _name(quantised)
        saved = _saved(model, quantised)
        size = None if saved is None else plain - saved
        known = "" if size is not None else "; its bytes are not known here"
        notes.append(f"the base is quantised ({how}){known}: counts are of its plain shapes, kernels were not tried")
    return BaseFacts(type(model).__name__, total, size, how, base_flops(model), notes)


def _quantisation(model: nn.Module) -> dict[str, Any]:
    found: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    return found if isinstance(found, dict) else found.to_dict() if found is not None else {}


def _name(q: dict[str, Any]) -> str:
    method = str(getattr(q.get("quant_method"), "value", q.get("quant_method")) or "unknown")
    if method == "bitsandbytes":
        return f"bitsandbytes, {4 if q.get('load_in_4bit') else 8} bits"
    return f"{method}, {q['bits']} bits" if isinstance(q.get("bits"), int) else method


def _saved(model: nn.Module, q: dict[str, Any]) -> int | None:
    """How many bytes less than plain; None where that is not known."""
    method = str(getattr(q.get("quant_method"), "value", q.get("quant_method")))
    skipped = q.get("llm_int8_skip_modules") or q.get("modules_to_not_convert") or []
    size = _BYTES.get(method)
    if size is None:
        return None
    head = getattr(model, "get_output_embeddings", lambda: None)()
    saved = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or module is head or any(s in name for s in skipped):
            continue
        into, out = in_and_out(module)
        small = size(into, out, q)
        if small is None:
            return None
        saved += module.weight.numel() * module.weight.element_size() - small
    return saved


def _bitsandbytes(into: int, out: int, q: dict[str, Any]) -> int:
    if not q.get("load_in_4bit"):
        return into * out + 4 * out  # int8, and a float32 scale per row
    blocks = -(
        -into * out // 64
    )  # half a byte per weight, and per block of 64 a float32, or a byte with blocks of its own
    scales = blocks + 4 * -(-blocks // 256) + 4 if q.get("bnb_4bit_use_double_quant") else 4 * blocks
    return -(-into * out // 2) + scales + 4 * 16  # the 16 values of its code


def _gptq(into: int, out: int, q: dict[str, Any]) -> int | None:
    small = _packed(into, out, q)
    return None if small is None else small + 4 * into  # g_idx: the group of each input


def _packed(into: int, out: int, q: dict[str, Any]) -> int | None:
    """Weights and zero points packed into int32, a float16 scale for each group and output."""
    bits, group = q.get("bits", q.get("w_bit")), q.get("group_size", q.get("q_group_size", 128))
    if bits not in (2, 3, 4, 8) or not isinstance(group, int):
        return None
    groups = 1 if group <= 0 else -(-into // group)
    return into * out * bits // 8 + groups * out * bits // 8 + 2 * groups * out


_BYTES = {"bitsandbytes": _bitsandbytes, "gptq": _gptq, "awq": _packed}
