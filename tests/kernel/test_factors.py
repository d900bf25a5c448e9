"""Every function of Factors in float64 against the naive dense formula, and what must never be made on the way."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import rankfold.kernel.factors
from rankfold import Factors

OUT, IN = 7, 5


def make(rank: int = 3, gate: bool = True, scale: float = 0.5, out: int = OUT, in_: int = IN, **kwargs) -> Factors:
    kwargs = {"dtype": torch.float64} | kwargs
    return Factors(
        torch.randn(rank, in_, **kwargs),
        torch.randn(out, rank, **kwargs),
        torch.randn(rank, **kwargs) if gate else None,
        scale,
    )


def dense(f: Factors) -> Tensor:
    """The sum over components, one outer product at a time."""
    total = torch.zeros(f.shape, dtype=f.up.dtype)
    for i in range(f.rank):
        g = 1.0 if f.gate is None else f.gate[i]
        total += f.scale * g * torch.outer(f.up[:, i], f.down[i])
    return total


@pytest.fixture(
    params=[(3, True, 0.5), (3, False, 2.0), (9, True, 1.0), (1, False, -1.5), (0, True, 0.5), (0, False, 1.0)]
)
def f(request: pytest.FixtureRequest) -> Factors:
    rank, gate, scale = request.param
    return make(rank, gate, scale)


def test_shape_and_rank(f):
    assert f.shape == (OUT, IN)
    assert f.rank == len(f.down)


def test_delta(f):
    assert_close(f.delta(), dense(f))
    assert f.delta().shape == (OUT, IN)


def test_baked(f):
    assert_close(f.baked().delta(), dense(f))
    assert f.baked().gate is None
    assert f.baked().scale == 1.0
    assert f.baked().down is f.down


@pytest.mark.parametrize("s", [0.0, -1.0, 2.5])
def test_scaled(f, s):
    assert_close(f.scaled(s).delta(), s * dense(f))
    assert f.scaled(s).up is f.up


def test_select():
    f = make(4)
    keep = torch.tensor([True, False, True, True])
    dropped = Factors(f.down[[1]], f.up[:, [1]], f.gate[[1]], f.scale)
    assert_close(f.select(keep).delta(), dense(f) - dense(dropped))
    assert f.select(keep).rank == 3
    order = f.select(torch.tensor([3, 0]))
    assert torch.equal(order.down, f.down[[3, 0]])
    assert torch.equal(order.up, f.up[:, [3, 0]])
    assert torch.equal(order.gate, f.gate[[3, 0]])
    assert order.scale == f.scale


@pytest.mark.parametrize("gate", [True, False])
def test_select_nothing_and_from_nothing(gate):
    assert make(3, gate).select(torch.zeros(3, dtype=torch.bool)).delta().eq(0).all()
    assert make(0, gate).select(torch.zeros(0, dtype=torch.bool)).rank == 0


@pytest.mark.parametrize(
    "parts",
    [
        [(2, False, 0.5), (3, False, 0.5)],
        [(2, False, 0.5), (3, False, 2.0)],
        [(2, True, 0.5), (3, False, 0.5)],
        [(2, False, 1.0), (3, True, -3.0), (4, True, 0.1)],
        [(2, True, 0.5), (0, False, 2.0)],
        [(0, False, 1.0), (0, True, 1.0)],
        [(2, True, 0.5)],
    ],
)
def test_concat(parts):
    fs = [make(*p) for p in parts]
    joined = fs[0].concat(*fs[1:])
    assert_close(joined.delta(), torch.stack([dense(f) for f in fs]).sum(0))
    assert joined.rank == sum(f.rank for f in fs)
    assert torch.equal(joined.down, torch.cat([f.down for f in fs])), "components stay in their order"


def test_concat_keeps_a_common_scale_out_of_the_tensors():
    a, b = make(2, False, 0.5), make(3, False, 0.5)
    joined = a.concat(b)
    assert joined.gate is None
    assert joined.scale == 0.5
    assert torch.equal(joined.up, torch.cat([a.up, b.up], 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_round_scales_and_gates(dtype):
    """A merge widens the sum of an adapter's blocks: the factors are what is rounded, and no more."""
    a, b = make(2, False, 4 / 3, dtype=dtype), make(3, False, -0.7, dtype=dtype)
    wanted = dense(a.to(torch.float64)) + dense(b.to(torch.float64))
    assert_close(a.concat(b).to(torch.float64).delta(), wanted, rtol=1e-6, atol=1e-6)
    gated = Factors(a.down, a.up, torch.tensor([1.003, 0.997]))
    assert torch.equal(gated.baked().up, (a.up.double() * gated.gate.double()).to(dtype))


@pytest.mark.parametrize("shape", [(OUT, IN + 1), (OUT + 1, IN)])
def test_concat_of_different_weights(shape):
    with pytest.raises(ValueError, match=r"updates of different weights.*\(7, 5\)"):
        make().concat(make(out=shape[0], in_=shape[1]))


@pytest.mark.parametrize("rank", [9, 10, 16])
def test_pad(f, rank):
    padded = f.pad(rank)
    assert padded.rank == rank
    assert_close(padded.delta(), dense(f))
    assert padded.down[f.rank :].eq(0).all()
    assert padded.up[:, f.rank :].eq(0).all()
    assert padded.pad(rank) is padded


def test_pad_does_not_shrink():
    with pytest.raises(ValueError, match=r"rank 3 exceeds 2; compress first"):
        make(3).pad(2)


def test_balanced(f):
    b = f.balanced()
    assert b.gate is None
    assert b.scale == 1.0
    assert_close(b.delta(), dense(f))
    assert_close(b.up.norm(dim=0), b.down.norm(dim=1))


def test_balanced_dead_components_are_zero():
    f = make(4, scale=1.0)
    f.up[:, 0] = 0
    f.down[1] = 0
    f.gate[2] = 0
    f.gate[3] = -5.0
    b = f.balanced()
    assert b.up[:, :3].eq(0).all()
    assert b.down[:3].eq(0).all()
    assert_close(b.delta(), dense(f))
    assert_close(b.up[:, 3].norm(), b.down[3].norm())


@pytest.mark.parametrize("where", ["up", "down", "gate"])
def test_balanced_does_not_hide_nan(where):
    f = make(2)
    getattr(f, where).view(-1)[0] = math.nan
    assert f.balanced().delta().isnan().any()


def orthonormal(columns: Tensor) -> bool:
    return torch.allclose(columns.T @ columns, torch.eye(columns.shape[1], dtype=columns.dtype), atol=1e-12)


def test_svd(f):
    u, sigma, vt = f.svd()
    q = min(f.rank, OUT, IN)
    assert (u.shape, sigma.shape, vt.shape) == ((OUT, q), (q,), (q, IN))
    assert_close(u * sigma @ vt, dense(f))
    assert orthonormal(u)
    assert orthonormal(vt.T)
    assert_close(sigma, torch.linalg.svdvals(dense(f))[:q])
    assert sigma.diff().le(0).all()


@pytest.mark.parametrize("rank", range(7))
def test_compress_rank_is_optimal(rank):
    f = make(6)
    u, sigma, vt = torch.linalg.svd(dense(f), full_matrices=False)
    best = u[:, :rank] * sigma[:rank] @ vt[:rank]
    c = f.compress(rank)
    assert c.rank == min(rank, OUT, IN)
    assert_close(c.delta(), best)
    assert_close((dense(f) - c.delta()).norm(), sigma[rank:].norm(), atol=1e-12, rtol=1e-12)
    assert_close(c.up.norm(dim=0), c.down.norm(dim=1))


@pytest.mark.parametrize("energy", [1e-9, 0.1, 0.5, 0.9, 0.99, 0.99999])
def test_compress_energy_is_minimal(energy):
    f = make(4)
    c = f.compress(energy=energy)
    total = dense(f).norm() ** 2
    assert c.delta().norm() ** 2 >= energy * total
    assert f.compress(c.rank - 1).delta().norm() ** 2 < energy * total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compress_all_the_energy_keeps_the_small_singular_values(dtype):
    sigma = torch.tensor([1.0, 1e-2, 1e-5], dtype=dtype)  # squares that a float32 sum would swallow
    f = Factors(torch.eye(3, IN, dtype=dtype), torch.eye(OUT, 3, dtype=dtype) * sigma)
    assert f.compress(energy=1.0).rank == 3
    tiny = Factors(f.down * 1e-15, f.up * 1e-15)
    assert tiny.compress(energy=1.0).rank == 3, "squares below float32's smallest number"


def test_compress_rank_0_and_zero_updates():
    assert make(0).compress(4).rank == 0
    assert make(0).compress(energy=0.5).rank == 0
    assert make(3, scale=0.0).compress(energy=0.5).rank == 0
    assert make(3, scale=0.0).compress(2).delta().eq(0).all()
    assert make(3).compress(0).delta().eq(0).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "give either rank or energy"),
        ({"rank": 2, "energy": 0.5}, "give either rank or energy"),
        ({"rank": -1}, "rank=-1 is negative"),
        ({"energy": 0.0}, r"energy=0.0 is not in \(0, 1\]"),
        ({"energy": 1.5}, r"energy=1.5 is not in \(0, 1\]"),
        ({"energy": math.nan}, r"energy=nan is not in \(0, 1\]"),
    ],
)
def test_compress_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(3).compress(**kwargs)


def test_norm(f):
    assert_close(f.norm(), dense(f).norm(), atol=1e-13, rtol=1e-13)
    assert f.norm().ndim == 0


def test_norm_of_a_tiny_difference_does_not_cancel():
    f = make(3, False, 1.0)
    nudge = torch.zeros_like(f.up)
    nudge[2, 1] = 1e-9
    difference = Factors(f.down, f.up + nudge).minus(f)
    assert difference.rank == 6
    assert_close(difference.norm(), (nudge @ f.down).norm(), rtol=1e-5, atol=0)


def test_minus():
    f, g = make(3, True, 0.5), make(2, False, 2.0)
    assert_close(f.minus(g).delta(), dense(f) - dense(g))
    assert f.minus(f).norm() < 1e-14
    assert_close(make(0).minus(g).delta(), -dense(g))
    assert_close(f.minus(make(0)).delta(), dense(f))


@pytest.mark.parametrize("gate", [True, False])
def test_to_and_detach(gate):
    f = make(3, gate, requires_grad=True)
    g = f.to(torch.float32)
    assert {t.dtype for t in (g.down, g.up, g.gate) if t is not None} == {torch.float32}
    assert g.scale == f.scale
    assert g.delta().requires_grad
    assert f.to(torch.float64).down is f.down
    assert f.to("meta").delta().device.type == "meta"
    d = f.detach()
    assert not d.delta().requires_grad
    assert d.up.data_ptr() == f.up.data_ptr()
    assert (d.gate is None) == (not gate)


def test_delta_is_differentiable_in_every_factor():
    f = make(2, requires_grad=True)

    def delta(down, up, gate):
        return Factors(down, up, gate, 0.5).delta()

    assert torch.autograd.gradcheck(delta, (f.down, f.up, f.gate))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    f = make(3, dtype=dtype)
    wide = f.to(torch.float64)
    assert f.delta().dtype == dtype
    assert_close(f.delta().double(), dense(wide), rtol=0.05, atol=0.05)
    assert_close(f.balanced().delta().double(), dense(wide), rtol=0.05, atol=0.05)
    assert f.compress(2).up.dtype == torch.float32, "there is no QR of half precision"
    assert_close(f.compress(2).delta().double(), wide.compress(2).delta(), rtol=1e-5, atol=1e-5)
    assert_close(f.norm().double(), wide.norm(), rtol=1e-5, atol=0)


def test_a_gate_wider_than_the_factors():
    f = make(3, dtype=torch.bfloat16)
    f = Factors(f.down, f.up, f.gate.float())
    assert f.delta().dtype == torch.bfloat16
    assert f.concat(f).rank == 6
    assert f.pad(4).gate.dtype == torch.float32
    assert f.balanced().up.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("down", "up", "gate", "message"),
    [
        ((3, IN), (OUT, 2), None, r"up \(7, 2\) is not out×3 for down \(3, 5\)"),
        ((3, IN), (3,), None, r"up \(3,\) is not out×3"),
        ((3,), (OUT, 3), None, r"down \(3,\)"),
        ((3, IN), (OUT, 3), (2,), r"gate \(2,\) is not \(3,\), the rank of down and up"),
        ((3, IN), (OUT, 3), (3, 1), r"gate \(3, 1\) is not \(3,\)"),
    ],
)
def test_shapes_that_do_not_fit(down, up, gate, message):
    with pytest.raises(ValueError, match=message):
        Factors(torch.zeros(down), torch.zeros(up), None if gate is None else torch.zeros(gate))


class Largest(TorchDispatchMode):
    """Records how many numbers the largest tensor has that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize(
    "use",
    [
        lambda f: f.norm(),
        lambda f: f.svd(),
        lambda f: f.compress(2),
        lambda f: f.compress(energy=0.5),
        lambda f: f.minus(f).norm(),
        lambda f: f.balanced(),
        lambda f: f.concat(f).pad(16),
    ],
    ids=["norm", "svd", "compress-rank", "compress-energy", "minus", "balanced", "concat-pad"],
)
def test_nothing_of_size_out_by_in_is_made(use: Callable):
    out, in_, r = 3000, 2000, 4
    f = make(r, out=out, in_=in_, dtype=torch.float32)
    with Largest() as seen:
        use(f)
    assert 0 < seen.numel <= 16 * out, "no more than the padded factor itself"


def test_a_model_of_any_size_on_the_meta_device():
    f = make(8, out=2**24, in_=2**24, dtype=torch.float32, device="meta")  # ΔW would be a petabyte
    assert f.norm().shape == ()
    assert f.compress(4).shape == (2**24, 2**24)
    assert f.concat(f).pad(32).rank == 32


def test_examples_in_docstrings():
    assert doctest.testmod(rankfold.kernel.factors).failed == 0
    assert doctest.testmod(rankfold.kernel.factors).attempted >= 4


@pytest.mark.parametrize("gate", [None, torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)])
def test_alive_drops_what_adds_nothing_and_balanced_splits_gate_and_scale(gate):
    down, up = torch.randn(3, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    f = Factors(down, up, gate, scale=-0.3)
    assert torch.allclose(f.alive().delta(), f.delta(), atol=1e-15)
    assert f.alive().rank == (3 if gate is None else 2)
    assert Factors(down, up, gate, scale=0.0).alive().rank == 0
    even = f.alive().balanced()
    assert torch.allclose(even.delta(), f.delta(), atol=1e-14)
    assert torch.allclose(even.up.norm(dim=0), even.down.norm(dim=1))


def test_places_of_a_selecting_factor_follow_it():
    index = torch.tensor([3, 0])
    f = Factors(torch.eye(5)[index], torch.randn(4, 2), None, 0.5, down_index=index)
    assert f.select(torch.tensor([False, True])).down_index.tolist() == [0]
    assert f.to(torch.float64).down_index is f.scaled(2.0).down_index is f.detach().down_index is index
    assert f.pad(3).down_index is f.concat(f).down_index is f.baked().down_index is f.balanced().down_index is None
    with pytest.raises(ValueError, match=r"Factors: down_index \(3,\) torch.int64 is not \(2,\) int64"):
        Factors(f.down, f.up, down_index=torch.arange(3))
    with pytest.raises(ValueError, match="down_index is given, but down is trained"):
        Factors(f.down.clone().requires_grad_(), f.up, down_index=index)
