"""RaSA's reconstruction theorem and coordinate descent: golden values (spec G2), exactness, and the example."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

import pytest
import torch
from reconstruction import RasaFit, coordinate_descent, feasible_point, lora_error
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from rankfold import Factors


def det(shape: tuple[int, int], a: float, b: float, c: float) -> Tensor:
    """The spec's golden matrices."""
    p, q = torch.arange(shape[0]).double()[:, None], torch.arange(shape[1]).double()[None]
    return torch.sin(a + b * p + c * q + 0.1 * p * q)


@pytest.fixture(scope="module")
def golden() -> list[Tensor]:
    return [
        det((10, 10), 0.3 * i, 0.37 + 0.11 * i, 0.53 - 0.07 * i) + 0.5 * torch.cos(3 * det((10, 10), i, 1.7, 0.9))
        for i in range(4)
    ]


def randoms(n: int, out: int, in_: int) -> list[Tensor]:
    return [torch.randn(out, in_, dtype=torch.float64) for _ in range(n)]


def test_golden_errors(golden):
    assert abs(lora_error(golden, 3) - 77.1655147171) < 1e-9
    assert abs(feasible_point(golden, 3, 1).error(golden) - 77.1655147171) < 1e-9


def test_golden_descent(golden):
    errors, fit = coordinate_descent(golden, 3, 1, sweeps=50)
    assert len(errors) == 51
    assert abs(errors[0] - 77.1655147171) < 1e-9
    assert abs(errors[1] - 75.566810) < 1e-5
    assert abs(errors[-1] - 36.97) < 0.005
    assert all(b <= a for a, b in itertools.pairwise(errors))
    assert fit.error(golden) == errors[-1]


@pytest.mark.parametrize("k", range(5))
@pytest.mark.parametrize(("n", "out", "in_"), [(3, 9, 6), (3, 6, 9), (1, 7, 7), (5, 4, 4)])
def test_the_feasible_point_attains_lora(n, out, in_, k):
    """Theorem 3.1, with equality, for every k and shape."""
    targets = randoms(n, out, in_)
    fit = feasible_point(targets, 4, k)
    assert fit.error(targets) == pytest.approx(lora_error(targets, 4), rel=1e-12, abs=1e-12)
    assert [f.rank for f in fit.private] == [4 - k] * n
    assert (fit.pool.rank, len(fit.gates[0])) == (n * k, n * k)
    gates = torch.stack(fit.gates)
    for i, row in enumerate(gates):
        own = torch.zeros(n * k, dtype=torch.bool)
        own[i * k : (i + 1) * k] = True
        assert row[~own].eq(0).all(), "a layer's values are in its own slots"
        sigma = torch.linalg.svdvals(targets[i])
        assert_close(row[own], sigma[4 - k : 4])
    for m, update in zip(targets, fit.updates(), strict=True):
        u, sigma, vt = torch.linalg.svd(m, full_matrices=False)
        assert_close(update.delta(), u[:, :4] * sigma[:4] @ vt[:4])
        assert update.rank == 4 - k + n * k


@pytest.mark.parametrize("k", range(4))
@pytest.mark.parametrize(("out", "in_"), [(8, 12), (12, 8)])
def test_descent_never_rises(k, out, in_):
    targets = randoms(4, out, in_)
    errors, fit = coordinate_descent(targets, 3, k, sweeps=30)
    assert len(errors) == 31
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.99 * errors[0] or k == 0
    assert [f.rank for f in fit.updates()] == [3 - k + 4 * k] * 4


def test_the_updates_are_rasa(golden):
    """[B̃_i B_S] diag(1, D_i) [Ã_i ; A_S], written out."""
    _, fit = coordinate_descent(golden, 3, 2, sweeps=2)
    total = 0.0
    for m, private, d, update in zip(golden, fit.private, fit.gates, fit.updates(), strict=True):
        dense = private.up @ private.down + fit.pool.up @ torch.diag(d) @ fit.pool.down
        assert_close(update.delta(), dense)
        total += (m - dense).square().sum().item()
    assert fit.error(golden) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("sweeps", [1, 5])
def test_every_block_is_at_its_minimum_when_it_has_been_set(golden, sweeps):
    """D comes last, so its gradient is 0 at the end; as is that of A_S once D is put back to what A_S was set for."""
    _, before = coordinate_descent(golden, 3, 1, sweeps - 1)
    _, after = coordinate_descent(golden, 3, 1, sweeps)

    def gradients(private: tuple[Factors, ...], a: Tensor, b: Tensor, d: Tensor) -> list[Tensor]:
        variables = [t.detach().clone().requires_grad_() for t in (a, b, d)]
        a, b, d = variables
        rest = (m - f.delta() - (b * g) @ a for m, f, g in zip(golden, private, d, strict=True))
        return list(torch.autograd.grad(sum(r.square().sum() for r in rest), variables))

    a0, d0 = before.pool.down, torch.stack(before.gates)
    a, b, d = after.pool.down, after.pool.up, torch.stack(after.gates)
    assert gradients(after.private, a, b, d)[2].abs().max() < 1e-9
    assert gradients(after.private, a, b, d0)[0].abs().max() < 1e-9
    assert gradients(after.private, a0, b, d0)[1].abs().max() < 1e-9
    for m, f, g in zip(golden, after.private, d0, strict=True):
        rest = m - (before.pool.up * g) @ a0
        assert (rest - f.delta()).norm() == pytest.approx(torch.linalg.svdvals(rest)[2:].norm().item(), rel=1e-12)


def test_targets_of_low_rank_and_zero_are_exact():
    low = [torch.randn(8, 2, dtype=torch.float64) @ torch.randn(2, 6, dtype=torch.float64) for _ in range(3)]
    for targets in (low, [torch.zeros_like(m) for m in low]):
        assert lora_error(targets, 3) < 1e-24
        errors, _ = coordinate_descent(targets, 3, 1, sweeps=3)
        assert max(errors) < 1e-13


def test_no_sweeps_is_the_feasible_point(golden):
    errors, fit = coordinate_descent(golden, 3, 1, sweeps=0)
    assert errors == [feasible_point(golden, 3, 1).error(golden)]
    assert isinstance(fit, RasaFit)


def test_another_start(golden):
    """From where a descent left off, it goes on as if it had not stopped; from a random pool it goes down too."""
    errors, half = coordinate_descent(golden, 3, 1, sweeps=2)
    more, _ = coordinate_descent(golden, 3, 1, sweeps=2, start=half)
    assert errors + more[1:] == pytest.approx(coordinate_descent(golden, 3, 1, sweeps=4)[0], rel=1e-12)
    pool = Factors(torch.randn(4, 10, dtype=torch.float64), torch.randn(10, 4, dtype=torch.float64))
    errors, _ = coordinate_descent(golden, 3, 1, 30, RasaFit(half.private, pool, (torch.ones(4).double(),) * 4))
    assert all(b <= a for a, b in itertools.pairwise(errors))
    assert errors[-1] < lora_error(golden, 3)


def test_float32(golden):
    narrow = [m.float() for m in golden]
    errors, fit = coordinate_descent(narrow, 3, 1, sweeps=1)
    assert errors[1] == pytest.approx(75.566810, rel=1e-4)
    assert fit.pool.up.dtype == torch.float32


@pytest.mark.parametrize(
    ("targets", "r", "k", "message"),
    [
        ([], 2, 1, "one or more matrices"),
        ([torch.ones(3, 4), torch.ones(4, 3)], 2, 1, r"of one shape; found the shapes \[\(3, 4\), \(4, 3\)\]"),
        ([torch.ones(3)], 1, 1, "matrices"),
        ([torch.ones(3, 4)], 0, 0, r"r=0 must be from 1 to 3"),
        ([torch.ones(3, 4)], 4, 1, r"r=4 must be from 1 to 3"),
        ([torch.ones(3, 4)], 2, 3, r"k=3 exceeds r=2"),
        ([torch.ones(3, 4)], 2, -1, r"k=-1 exceeds r=2; choose 0 <= k <= r"),
    ],
)
def test_refusals(targets, r, k, message):
    with pytest.raises(ValueError, match=message):
        coordinate_descent(targets, r, k)


# The example ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example() -> ModuleType:
    file = Path(__file__).parents[2] / "examples" / "rasa_reconstruction.py"
    spec = importlib.util.spec_from_file_location("rasa_reconstruction", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_example(example, tmp_path, capsys, suffix):
    names = [f"model.layers.{i}.{m}.weight" for i in range(11) for m in ("up", "down")]
    base = {n: torch.randn(6, 9) if "up" in n else torch.randn(9, 6) for n in names}
    base |= {"model.embed.weight": torch.randn(9, 6), "model.layers.0.norm.weight": torch.randn(6)}
    for folder, weights in (("base", base), ("tuned", {n: t + torch.randn_like(t) for n, t in base.items()})):
        (tmp_path / folder).mkdir()
        save_file(weights, tmp_path / folder / "model.safetensors")
    plot = tmp_path / f"plot.{suffix}"
    folders = ["--base", str(tmp_path / "base"), "--tuned", str(tmp_path / "tuned")]
    results = example.main([*folders, "-r", "3", "-k", "0", "1", "3", "--sweeps", "3", "--out", str(plot)])
    assert set(results) == {"model.layers.*.up:6x9", "model.layers.*.down:9x6"}
    for ratios in results.values():
        assert ratios[0] == pytest.approx(1.0, abs=1e-12)
        assert all(ratio < 1 for ratio in ratios[1:])
    assert plot.stat().st_size > 1000
    table = capsys.readouterr().out
    assert "model.layers.*.up:6x9" + " " * 38 + "11" in table


def test_example_in_depth_order(example):
    weights = {f"layers.{i}.up.weight": torch.full((2, 2), float(i)) for i in (10, 9, 2, 0)}
    zero = {n: torch.zeros(2, 2) for n in weights}
    assert [m[0, 0].item() for m in example.by_type(zero, weights)["layers.*.up:2x2"]] == [0, 2, 9, 10]


def test_example_refusals(example, tmp_path):
    with pytest.raises(SystemExit):
        example.main(["--base", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"no .safetensors file"):
        example.main(["--base", str(tmp_path), "--tuned", str(tmp_path)])
