"""Matrix products; in float32 they use oneDNN where MKL does not use the whole processor.

    y = linear(x, weight, bias)      # x weightᵀ + bias
    c = product(a, b)                # a b
    add_product_(c, a, b, alpha)     # c += alpha · a b

Torch's float32 products on x86 are MKL's. On an AMD processor with AVX-512 they take more than twice the time of the oneDNN that torch has
for half precision (docs/performance.md); its sums are float32's too, in another order. Everywhere else, and for small products,
these are torch's own operations. Operands have their final dtype: autocast is not asked.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

#: Minimum multiply-adds for which oneDNN's call overhead pays off.
WORTH = 2**21
#: Inner size from which a product that is added is worth a buffer of its own.
WIDE = 64


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias, for x N × in, weight out × in."""
    if _in_onednn(x, weight, weight.shape[1]) and (
        bias is None or (_is_plain(bias) and bias.shape == weight.shape[:1])
    ):
        bias = None if bias is None else bias.contiguous()  # the operation minds no strides of it
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b, for two matrices; `out` is memory that the result may be written to."""
    if _in_onednn(a, b, b.shape[0]):
        return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
    return torch.mm(a, b, out=out)


def add_product_(out: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """out += alpha · a b, in place. `alpha` has no default: with dynamic shapes a compiler takes a default for a symbol."""
    if b.shape[0] >= WIDE and _in_onednn(a, b, b.shape[0]):
        out.add_(product(a, b), alpha=alpha)
    else:
        out.addmm_(a, b, alpha=alpha)


def _in_onednn(a: Tensor, b: Tensor, inner: int) -> bool:
    """Whether oneDNN computes a's product with b, over `inner` columns of a. Shapes that do not fit are left to torch and its errors."""
    return (
        _is_plain(a)
        and _is_plain(b)
        and a.shape[0] * b.numel() >= WORTH
        and a.shape[1] == inner
        and not torch.compiler.is_compiling()  # inductor chooses for itself, and refuses this operation
        and _mkl_holds_back()
        and bool(torch.backends.mkldnn.enabled)  # the user's switch: torch.backends.mkldnn.set_flags(False)
    )


def _is_plain(t: Tensor) -> bool:
    return t.dtype == torch.float32 and t.device.type == "cpu" and not is_subclass(t)


def is_subclass(t: Tensor) -> bool:
    """Whether t is a tensor subclass: sharded, fake, quantised."""
    return type(t) not in (Tensor, torch.nn.Parameter)


@cache
def _mkl_holds_back() -> bool:
    """Whether this is a processor with AVX-512 not made by Intel, and this torch has the operation used here."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.backends.mkl.is_available() and _has_onednn() and "GenuineIntel" not in _vendor()


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _vendor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else platform.processor()
