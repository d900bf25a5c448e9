"""Dropout masks: as many elements as they should drop, independently, and the same gradient as a dense mask's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rankfold import Factors
from rankfold.kernel.dropout import SPARSE, add_dropped_product_, drop_mask, dropped
from rankfold.kernel.layout import Member, Term
from rankfold.kernel.linears import low_rank_linears

P = [1e-3, 0.05, SPARSE, 0.2, 0.5, 0.9]


def kept(x: Tensor, p: float) -> Tensor:
    """The mask, dense, as float64."""
    return dropped(torch.ones_like(x, dtype=torch.float64), drop_mask(x, p)[0])


def test_nothing_is_dropped_at_zero():
    x = torch.randn(3, 4)
    assert drop_mask(x, 0.0) == (None, 1.0)
    assert dropped(x, None) is x


@pytest.mark.parametrize("p", P)
def test_the_share_that_is_kept(p: float):
    x = torch.empty(300, 1001)
    torch.manual_seed(0)
    keep = drop_mask(x, p)[1]
    assert abs(keep - (1 - p)) <= (0 if p <= SPARSE else 1 / 512)
    shares = torch.stack([kept(x, p).mean() for _ in range(20)])
    sigma = (keep * (1 - keep) / x.numel()) ** 0.5
    assert abs(shares.mean() - keep) < 5 * sigma / 20**0.5
    assert 0.5 * sigma < shares.std() < 2 * sigma  # neither too even nor too clustered


def test_not_everything_is_dropped_whatever_p_is():
    """A byte is not below 256: nothing was dropped at p = 0.999, and everything multiplied by 0."""
    torch.manual_seed(0)
    x = torch.empty(300, 1001)
    assert drop_mask(x, 0.999)[1] == 1 / 256
    assert abs(kept(x, 0.999).mean() - 1 / 256) < 5 * (1 / 256 / x.numel()) ** 0.5


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_elements_are_independent(p: float):
    torch.manual_seed(0)
    mask = kept(torch.empty(400, 500), p)
    keep = drop_mask(torch.empty(400, 500), p)[1]
    centred, limit = (mask - keep) / (keep * (1 - keep)) ** 0.5, 5 / mask.numel() ** 0.5
    for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(17, 1)):
        assert abs((centred * other).mean()) < limit
    assert (mask.mean(0) - keep).abs().max() < 6 * (keep * (1 - keep) / 400) ** 0.5  # no column is favoured
    assert (mask.mean(1) - keep).abs().max() < 6 * (keep * (1 - keep) / 500) ** 0.5  # nor a row, the last included


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_small_inputs_reach_their_last_element(n: int):
    torch.manual_seed(0)
    counts = sum(kept(torch.empty(1, n), 0.1) for _ in range(4000))
    assert (counts / 4000 - 0.9).abs().max() < 6 * (0.09 / 4000) ** 0.5


@pytest.mark.parametrize("p", P)
def test_a_mask_costs_at_most_a_byte_an_element(p: float):
    x = torch.empty(200, 1000)
    mask = drop_mask(x, p)[0]
    assert mask is not None
    assert mask.untyped_storage().nbytes() <= 1.05 * x.numel()


@pytest.mark.parametrize("p", P)
def test_the_seed_decides(p: float):
    torch.manual_seed(3)
    first = kept(torch.empty(50, 60), p)
    again = kept(torch.empty(50, 60), p)
    torch.manual_seed(3)
    assert torch.equal(first, kept(torch.empty(50, 60), p))
    assert p < 0.01 or not torch.equal(first, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", P)
def test_adding_a_dropped_product_leaves_the_rest_bit_for_bit(p: float, dtype: torch.dtype):
    torch.manual_seed(0)
    before, left, right = torch.randn(30, 40).to(dtype), torch.randn(30, 3).to(dtype), torch.randn(3, 40).to(dtype)
    mask = drop_mask(before, p)[0]
    out = before.clone()
    add_dropped_product_(out, left, right, mask)
    gone = dropped(torch.ones(30, 40), mask) == 0
    assert torch.equal(out[gone], before[gone])
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {}  # one rounding less than here
    assert_close(out[~gone], (before + left @ right)[~gone], **tolerance)


def test_a_view_of_another_layout_can_be_dropped():
    x = torch.randn(40, 30).T
    for p in (0.05, 0.5):
        mask = drop_mask(x, p)[0]
        assert_close(dropped(x, mask), x * dropped(torch.ones(30, 40), mask))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.4])
def test_gradients(p: float):
    torch.manual_seed(0)
    new = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    x, tensors = new(6, 5), [new(2, 5), new(4, 2), new(2), new(3, 5), new(7, 3)]

    def outputs(x: Tensor, a: Tensor, b: Tensor, gate: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        members = [
            Member(torch.ones(4, 5, dtype=torch.float64), None, [Term([Factors(a, b, gate, 0.7)], p)]),
            Member(torch.ones(7, 5, dtype=torch.float64), None, [Term([Factors(c, d, None, 1.3)], p)]),
        ]
        return low_rank_linears(x, members)

    assert torch.autograd.gradcheck(outputs, (x, *tensors))
