"""Products that oneDNN makes in MKL's place are MKL's to rounding, whatever lies where in memory (products.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rankfold import Factors
from rankfold.kernel import matmul as products
from rankfold.kernel.layout import Member, Term
from rankfold.kernel.linears import low_rank_linears
from rankfold.kernel.matmul import add_product_, linear, product

N, INTO, OUT = 160, 96, 144
OPERATION = "mkldnn::_linear_pointwise"

#: Where a matrix lies: name → one of this shape.
LAYOUTS: dict[str, Callable[[int, int], Tensor]] = {
    "contiguous": lambda n, m: torch.randn(n, m),
    "transposed": lambda n, m: torch.randn(m, n).T,
    "columns of a wider one": lambda n, m: torch.randn(n, 3 * m)[:, m : 2 * m],
    "every other column": lambda n, m: torch.randn(n, 2 * m)[:, ::2],
    "one row, expanded": lambda n, m: torch.randn(1, m).expand(n, m),
    "one column, expanded": lambda n, m: torch.randn(n, 1).expand(n, m),
    "one number, expanded": lambda n, m: torch.randn(()).expand(n, m),
}


@pytest.fixture
def onednn(monkeypatch):
    """As on a processor that MKL holds back."""
    if not products._has_onednn():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "_mkl_holds_back", lambda: True)
    monkeypatch.setattr(products, "WORTH", 2**16)


def operations(run: Callable[[], object]) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        run()
    return {event.key for event in found.key_averages()}


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_products_are_torchs_wherever_their_operands_lie(onednn, left, right):
    torch.manual_seed(0)
    a, weight, b = LAYOUTS[left](N, INTO), LAYOUTS[right](OUT, INTO), LAYOUTS[right](INTO, OUT)
    y, bias = torch.randn(N, OUT), torch.randn(OUT)
    assert_close(linear(a, weight), a @ weight.T, atol=1e-4, rtol=1e-4)
    assert_close(linear(a, weight, bias), a @ weight.T + bias, atol=1e-4, rtol=1e-4)
    assert_close(product(a, b), a @ b, atol=1e-4, rtol=1e-4)
    expected = y + 0.5 * (a @ b)
    add_product_(y, a, b, alpha=0.5)
    assert_close(y, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "bias",
    [torch.randn(2 * OUT)[::2], torch.tensor([3.0]).expand(OUT), torch.randn(1)],
    ids=["strided", "expanded", "one"],
)
def test_a_bias_wherever_it_lies(onednn, bias):
    x, weight = torch.randn(N, INTO), torch.randn(OUT, INTO)
    assert_close(linear(x, weight, bias), x @ weight.T + bias, atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_has_torchs_message(onednn):
    x, weight = torch.randn(N, INTO), torch.randn(OUT, INTO + 1)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x, weight)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        product(x, weight)
    with pytest.raises(RuntimeError):
        linear(x, torch.randn(OUT, INTO), torch.randn(OUT, device="meta"))


def test_exact_to_float32_s_own_rounding(onednn):
    torch.manual_seed(0)
    a, b = torch.randn(N, 512), torch.randn(512, OUT)
    assert OPERATION in operations(lambda: product(a, b))
    error = (product(a, b).double() - a.double() @ b.double()).abs()
    # a sum of k products in any order errs by less than k·ε of the sum of their sizes; in practice by its root
    assert (error <= 512**0.5 * torch.finfo(torch.float32).eps * (a.abs() @ b.abs())).all()


def test_what_stays_with_torch(onednn):
    big, thin = torch.randn(N, INTO), torch.randn(4, INTO)
    assert OPERATION in operations(lambda: linear(big, big))
    others: dict[str, Callable[[], object]] = {
        "small": lambda: linear(thin, thin),
        "float64": lambda: linear(big.double(), big.double()),
        "bfloat16": lambda: linear(big.bfloat16(), big.bfloat16()),
        "meta": lambda: linear(big.to("meta"), big.to("meta")),
        "no rows": lambda: linear(big[:0], big),
        "narrow sums": lambda: add_product_(torch.zeros(N, N), big[:, :8], big[:, :8].T, 1.0),
    }
    for name, run in others.items():
        assert OPERATION not in operations(run), name
    torch.backends.mkldnn.set_flags(False)
    try:
        assert OPERATION not in operations(lambda: linear(big, big))
    finally:
        torch.backends.mkldnn.set_flags(True)


def test_gradients_of_siblings_are_those_of_torchs_products(onednn, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(2, N, INTO, requires_grad=True)
    weights = [nn.Parameter(torch.randn(OUT, INTO) / 10, requires_grad=bool(i)) for i in range(2)]
    factors = [
        Factors(nn.Parameter(torch.randn(8, INTO) / 10), nn.Parameter(torch.randn(OUT, 8)), None, 2.0) for _ in range(2)
    ]
    members = [Member(w, None, [Term([f])]) for w, f in zip(weights, factors, strict=True)]
    leaves = [x, weights[1], *(t for f in factors for t in (f.down, f.up))]

    def run() -> list[Tensor]:
        outputs = low_rank_linears(x, members)
        return [*(y.detach() for y in outputs), *torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves)]  # pyright: ignore[reportArgumentType, reportCallIssue]

    assert OPERATION in operations(run)
    ours = run()
    monkeypatch.setattr(products, "_mkl_holds_back", lambda: False)
    assert OPERATION not in operations(run)
    for got, want in zip(ours, run(), strict=True):
        assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [("AuthenticAMD", "AVX512", True), ("GenuineIntel", "AVX512", False), ("AuthenticAMD", "AVX2", False)],
)
def test_which_processors(monkeypatch, vendor, capability, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(products, "_has_onednn", lambda: True)
    monkeypatch.setattr(products, "_vendor", lambda: vendor)
    products._mkl_holds_back.cache_clear()
    assert products._mkl_holds_back() is expected
    products._mkl_holds_back.cache_clear()
