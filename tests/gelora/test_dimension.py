"""TwoNN against golden values, clouds of known dimension, and what must not change it."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from rankfold.gelora.dimension import distances, from_distances, random_halves, two_nn, two_nn_of

GOLDEN = torch.tensor([[0.0, 0], [1, 0], [3, 0], [6, 0], [10, 0]])


def cube(d: int, n: int, width: int, seed: int) -> torch.Tensor:
    """n points of a d-dimensional cube, rotated into `width` dimensions."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, d, generator=g, dtype=torch.float64)).Q
    return torch.rand(n, d, generator=g, dtype=torch.float64) @ basis.T


def test_golden_values() -> None:
    assert two_nn(GOLDEN) == pytest.approx(1.8252214, abs=1e-7)
    assert two_nn(GOLDEN, fit="mle") == pytest.approx(1.3138350, abs=1e-7)


def test_a_plain_loop_says_the_same() -> None:
    points = torch.randn(40, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ratios = []
    for i in range(40):
        near = sorted(math.dist(points[i], points[j]) for j in range(40) if j != i)
        ratios.append(math.log(near[1] / near[0]))
    x = sorted(ratios)[:36]
    y = [-math.log(1 - (j + 1) / 40) for j in range(36)]
    assert two_nn(points) == pytest.approx(sum(a * b for a, b in zip(x, y, strict=True)) / sum(a * a for a in x))
    assert two_nn(points, "mle") == pytest.approx(39 / sum(ratios))


def test_a_circle_is_a_line() -> None:
    found = []
    for seed in range(5):
        angle = 2 * math.pi * torch.rand(500, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found.append(two_nn(torch.stack([angle.cos(), angle.sin()], 1)))
    assert statistics.fmean(found) == pytest.approx(0.99, abs=0.1)


@pytest.mark.parametrize(
    ("d", "width", "mean", "sd"),
    [(2, 64, 1.94, 0.12), (5, 64, 4.61, 0.09), (10, 64, 8.54, 0.26), (20, 768, 15.86, 0.58)],
)
def test_a_rotated_cube_measures_what_is_documented(d: int, width: int, mean: float, sd: float) -> None:
    found = [two_nn(cube(d, 1000, width, seed)) for seed in range(5)]
    # two means of five: their difference has √(2/5) of one's deviation; four of those
    assert statistics.fmean(found) == pytest.approx(mean, abs=4 * sd * math.sqrt(2 / 5))


@pytest.mark.parametrize("fit", ["linear", "mle"])
def test_rotation_translation_scale_and_padding_change_nothing(fit) -> None:
    points = cube(3, 200, 8, 0)
    d = two_nn(points, fit)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    padded = torch.cat([points, torch.zeros(200, 5, dtype=torch.float64)], 1)
    for changed in (points @ rotation.T, points + 7.0, points * 1e-4, points * 1e6, padded):
        assert two_nn(changed, fit) == pytest.approx(d, rel=1e-7)


def test_a_large_offset_does_not_cancel() -> None:
    """States of a language model: a huge common component, and differences in the fifth digit."""
    points = cube(3, 300, 16, 0)
    far = (points + 100.0).float()
    assert two_nn(far) == pytest.approx(two_nn(points), rel=0.01)
    assert distances(far).diagonal().eq(0).all()


def test_duplicates_count_once() -> None:
    points = cube(4, 150, 8, 0).float()
    twice = torch.cat([points, points[:60], points[:5]])
    assert two_nn(twice) == two_nn(points)
    noise = 1e-7 * torch.randn(60, 8, generator=torch.Generator().manual_seed(1))
    assert two_nn(torch.cat([points, points[:60] + noise])) == two_nn(points)


@pytest.mark.parametrize(
    "points",
    [torch.ones(50, 4), torch.rand(2, 4), torch.empty(0, 4), torch.eye(6), torch.tensor([[0.0], [1], [0], [1]])],
)
def test_no_dimension_is_zero(points: torch.Tensor) -> None:
    assert two_nn(points) == two_nn(points, "mle") == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: two_nn(torch.rand(4)), "N × D"),
        (lambda: two_nn(torch.tensor([[0.0], [math.nan], [1]])), "NaN"),
        (lambda: two_nn(GOLDEN, discard=0.0), "discard=0.0 must be between 0 and 1"),
        (lambda: two_nn(GOLDEN, discard=1.0), "discard=1.0"),
        (lambda: two_nn(GOLDEN, fit="ml"), "fit='ml'"),  # pyright: ignore[reportArgumentType]
        (lambda: random_halves(100, 2, 0), "subsamples=2"),
    ],
)
def test_wrong_input_names_the_field(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_halves_are_halves_and_follow_the_seed() -> None:
    halves = random_halves(101, 4, seed=3)
    assert all(len(h) == 51 and h.unique().equal(h) for h in halves)
    assert all(a.equal(b) for a, b in zip(halves, random_halves(101, 4, seed=3), strict=True))
    assert not halves[0].equal(random_halves(101, 4, seed=4)[0])


def test_subsamples_are_measured_as_clouds_of_their_own() -> None:
    points = cube(3, 120, 6, 0)
    halves = random_halves(120, 3, 0)
    assert two_nn_of(points, halves) == pytest.approx([two_nn(points[half]) for half in halves])


def test_the_spread_of_halves_is_about_the_error_of_the_whole() -> None:
    whole = statistics.stdev(two_nn(cube(5, 400, 5, seed)) for seed in range(20))
    halves = [statistics.stdev(two_nn_of(cube(5, 400, 5, s), random_halves(400, 10, 0))) for s in range(6)]
    assert 0.5 * whole < statistics.fmean(halves) < 2 * whole


def test_too_few_points_and_small_discards_stay_finite() -> None:
    table = distances(torch.tensor([[0.0], [1.0], [3.0]]))
    assert math.isfinite(from_distances(table, discard=1e-9))
    assert math.isfinite(from_distances(table, discard=0.9))
