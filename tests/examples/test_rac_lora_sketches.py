"""RAC-LoRA's counterexample: a frozen sketch stalls where theory says, fresh sketches converge, and the adapter does the same."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from rac_lora_sketches import Side, descend, fresh, frozen, main, projector, stalls_at, with_rankfold

sides = pytest.mark.parametrize("side", ["right", "left"])


@sides
def test_fresh_sketches_converge_and_one_frozen_sketch_stalls(side: Side) -> None:
    values = descend(side, fresh(2500))
    assert values[-1] < 1e-29
    assert all(b <= a * (1 + 1e-9) or a < 1e-28 for a, b in itertools.pairwise(values))
    stalled = descend(side, frozen(600))
    assert stalled[-1] == pytest.approx(stalls_at(side, fresh(1)[0]), rel=1e-9)
    assert stalled[-1] > 1


@sides
def test_the_adapter_takes_the_same_steps(side: Side) -> None:
    """Links are compacted on the way: 120 of rank 1 in a 3×3 matrix."""
    values, sketches = with_rankfold(side, 120)
    assert values == pytest.approx(descend(side, sketches), rel=1e-6, abs=1e-20)
    assert values[-1] < 0.1 * values[0]


def test_the_mean_projector_is_r_over_d() -> None:
    g = torch.Generator().manual_seed(0)
    sketches = torch.randn(40_000, 8, 3, generator=g, dtype=torch.float64)
    q = torch.linalg.qr(sketches).Q
    torch.testing.assert_close(projector(sketches[0]), q[0] @ q[0].T)
    mean = (q @ q.transpose(1, 2)).mean(0)
    torch.testing.assert_close(mean, 3 / 8 * torch.eye(8, dtype=torch.float64), rtol=0, atol=0.005)


def test_the_script_draws_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--links", "20", "--out", str(tmp_path / "picture.svg")])
    assert (tmp_path / "picture.svg").stat().st_size > 1000
    assert "a frozen sketch cannot fall below 7.6832" in capsys.readouterr().out
