"""Scratch memory is reused between nodes, holds nothing that is wanted later, and goes with the graph (scratch.py)."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rankfold import Factors
from rankfold.kernel import fused_pass, gated_mlp, linears, scratch
from rankfold.kernel.layout import Member, Term
from rankfold.kernel.linears import low_rank_linears
from rankfold.kernel.scratch import Scratch, buffer, scratch_for

T = TypeVar("T")
WIDTH, INNER = 6, 10


def member(out: int, into: int, dropout: float) -> Member:
    f = Factors(nn.Parameter(torch.randn(2, into)), nn.Parameter(torch.randn(out, 2)), scale=0.7)
    return Member(torch.randn(out, into), None, [Term([f], dropout)])


class Net:
    """Siblings, then a gated MLP: every node that takes scratch memory."""

    def __init__(self, dropout: float) -> None:
        self.pair = [member(WIDTH, WIDTH, dropout) for _ in range(2)]
        self.mlp = [member(INNER, WIDTH, dropout), member(INNER, WIDTH, dropout), member(WIDTH, INNER, dropout)]
        blocks = [b for m in (*self.pair, *self.mlp) for t in m.terms for b in t.blocks]
        self.leaves = [t for b in blocks for t in (b.down, b.up)]

    def forward(self, x: Tensor) -> Tensor:
        one, two = low_rank_linears(x, self.pair)
        return gated_mlp.gated_mlp(one * two, self.mlp[0], self.mlp[1], self.mlp[2], gated_mlp.SILU)

    def run(self, x: Tensor) -> list[Tensor]:
        torch.manual_seed(1)
        y = self.forward(x)
        return [y.detach().clone(), *torch.autograd.grad(y.square().sum(), [x, *self.leaves])]


@pytest.fixture
def net_and_input(request):
    torch.manual_seed(0)
    return Net(request.param), torch.randn(2, 4, WIDTH, requires_grad=True)


DROPOUTS = pytest.mark.parametrize("net_and_input", [0.0, 0.05, 0.3], indirect=True)


def test_places_and_sizes():
    held = Scratch()
    like = torch.empty(0)
    a, b = buffer(held, "a", (4, 6), like), buffer(held, "b", (4, 6), like)
    assert a.data_ptr() != b.data_ptr()
    assert buffer(held, "a", (3, 5), like).data_ptr() == a.data_ptr()
    assert buffer(held, "a", (3, 5), like).is_contiguous()
    assert buffer(held, "a", (4, 6), like.bfloat16()).data_ptr() != a.data_ptr()
    assert buffer(held, "a", (40, 6), like).shape == (40, 6)
    assert buffer(None, "a", (4, 6), like.to("meta")).device.type == "meta"


def in_a_new_thread(run: Callable[[], T]) -> T:
    """Where no graph of another test holds scratch memory."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def test_one_a_thread_and_gone_with_its_holders():
    x = torch.empty(1)

    def run() -> tuple[ref, Scratch]:
        mine = scratch_for(x)
        assert mine is not None
        assert scratch_for(x) is mine
        other = in_a_new_thread(lambda: scratch_for(x))
        assert other is not None
        assert other is not mine
        return ref(mine), other

    mine, other = in_a_new_thread(run)
    assert mine() is None
    assert not other.buffers


def test_not_where_memory_is_kept_or_tensors_are_more_than_numbers():
    assert scratch_for(torch.empty(1, device="meta")) is None
    assert scratch_for(torch.empty(1).as_subclass(type("More", (Tensor,), {}))) is None
    with torch.inference_mode():
        assert scratch_for(torch.empty(1)) is None


@DROPOUTS
def test_nothing_depends_on_what_it_holds_nor_is_left_in_it(net_and_input, monkeypatch):
    net, x = net_and_input
    with monkeypatch.context() as patch:
        patch.setattr(scratch, "scratch_for", lambda _: None)
        for module in (linears, gated_mlp):
            patch.setattr(module, "scratch_for", lambda _: None)
        expected = net.run(x)

    def poisoned(held: Scratch | None, *args) -> Tensor:
        assert held is not None
        return buffer(held, *args).fill_(torch.nan)

    for module in (fused_pass, gated_mlp):
        monkeypatch.setattr(module, "buffer", poisoned)
    torch.manual_seed(1)
    y = net.forward(x)
    held = scratch_for(x)
    assert held is not None
    assert held.buffers
    for kept in held.buffers.values():
        kept.fill_(torch.nan)
    found = [y.detach().clone(), *torch.autograd.grad(y.square().sum(), [x, *net.leaves])]
    for kept in held.buffers.values():
        kept.fill_(torch.nan)
    for got, want in zip(found, expected, strict=True):
        assert_close(got, want, rtol=0, atol=0)


@DROPOUTS
def test_two_graphs_at_once_and_a_backward_in_another_thread(net_and_input):
    net, x = net_and_input
    z = torch.randn(3, 4, WIDTH, requires_grad=True)
    expected = [net.run(x), net.run(z)]
    outputs = []
    for t in (x, z):
        torch.manual_seed(1)
        outputs.append(net.forward(t))
    found: list[list[Tensor]] = [[], []]

    def back(i: int, t: Tensor) -> None:
        found[i] = [outputs[i].detach(), *torch.autograd.grad(outputs[i].square().sum(), [t, *net.leaves])]

    back(0, x)
    thread = threading.Thread(target=back, args=(1, z))
    thread.start()
    thread.join()
    for got, want in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("keep_output", [False, True])
def test_freed_when_the_backward_is_done(keep_output):
    def run() -> list[bool]:
        y = Net(0.05).forward(torch.randn(2, 4, WIDTH, requires_grad=True))
        held = ref(scratch_for(y))
        filled = bool(held().buffers)
        y.sum().backward()
        if not keep_output:
            del y
        gc.collect()
        return [filled, held() is None]

    assert in_a_new_thread(run) == [True, True]


@DROPOUTS
def test_under_another_default_device(net_and_input):
    net, x = net_and_input
    expected, alive = net.run(x), net.forward(x)
    with torch.device("meta"):
        found = net.run(x)
    for run in (found, net.run(x)):
        for got, want in zip(run, expected, strict=True):
            assert_close(got, want, rtol=0, atol=0)
    assert alive.isfinite().all()
