"""Distances of adapters and of models, against dense matrices in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from rankfold.algebra import diff
from rankfold.errors import RankfoldError
from rankfold.fold import read_source
from rankfold.kernel.factors import Factors

Make = Callable[..., Path]


@pytest.mark.parametrize(
    ("one", "other"), [("peft lora", "rasa"), ("peft q, v", "lora"), ("peft dora", "peft lora"), ("sora", "sora")]
)
def test_it_is_what_dense_matrices_say(one: str, other: str, adapter: Make) -> None:
    a, b = adapter(one, 1), adapter(other, 2)
    found = diff(a, b)
    sources = [read_source(p) for p in (a, b)]
    sites = {s.name: s for source in sources for s in source.sites}
    everything = []
    for layer in found.layers:
        dense = []
        for source in sources:
            if layer.module in source.adapted:
                update = source.update(layer.module)
                dense.append(update.delta() if isinstance(update, Factors) else update)
            else:
                site = sites[layer.module]
                dense.append(torch.zeros(site.out_features, site.in_features, dtype=torch.float64))
        x, y = dense
        everything.append(dense)
        assert layer.norm_a == pytest.approx(float(x.norm()), abs=1e-12)
        assert layer.norm_b == pytest.approx(float(y.norm()), abs=1e-12)
        assert layer.distance == pytest.approx(float((y - x).norm()))
        if x.any():
            assert layer.relative == pytest.approx(float((y - x).norm() / x.norm()))
            assert layer.cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), abs=1e-9)
        else:
            assert (layer.relative, layer.cosine) == (None, None)
    x, y = (torch.cat([pair[i].flatten() for pair in everything]) for i in (0, 1))
    assert found.whole.relative == pytest.approx(float((y - x).norm() / x.norm()))
    assert found.whole.cosine == pytest.approx(float(torch.cosine_similarity(x, y, dim=0)), abs=1e-9)


def test_an_adapter_and_itself(adapter: Make) -> None:
    a = adapter("rasa")
    found = diff(a, a)
    assert found.whole.relative is not None
    assert found.whole.relative < 1e-14
    assert found.whole.cosine == pytest.approx(1, abs=1e-14)


def test_a_small_difference_keeps_its_digits(adapter: Make, tmp_path: Path) -> None:
    """‖a‖² − 2⟨a, b⟩ + ‖b‖² would be all rounding here."""
    a = adapter("peft lora")
    near = adapter("peft lora")
    near.rename(tmp_path / "near")
    a = adapter("peft lora")
    tensors = load_file(tmp_path / "near" / "adapter_model.safetensors")
    wide = {k: v.double() for k, v in tensors.items()}
    moved = {k: v * (1 + 1e-10) if "lora_B" in k else v for k, v in wide.items()}
    save_file(wide, a / "adapter_model.safetensors")
    save_file(moved, tmp_path / "near" / "adapter_model.safetensors")
    exact = read_source(a).update("model.layers.0.mlp.up_proj").up.dtype == torch.float64  # pyright: ignore
    assert exact
    found = diff(a, tmp_path / "near")
    assert found.whole.relative is not None
    assert found.whole.relative < 1e-6


def test_two_models(bases: dict[str, Path]) -> None:
    found = diff(bases["llama"], bases["other"])
    layer = next(x for x in found.layers if x.module == "model.layers.1.mlp.down_proj.weight")
    assert layer.relative == pytest.approx(2**0.5, rel=0.1)  # two independent random matrices
    assert layer.cosine == pytest.approx(0, abs=0.1)
    with pytest.raises(RankfoldError, match="not of one architecture"):
        diff(bases["llama"], bases["wide"])
    with pytest.raises(RankfoldError, match="give two models of one type"):
        diff(bases["llama"], bases["gpt2"])


def test_what_is_shown(adapter: Make, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = adapter("peft q, v"), adapter("lora")
    found = diff(a, b)
    Console(width=120).print(found.table())
    shown = capsys.readouterr().out
    assert "‖ΔB−ΔA‖/‖ΔA‖" in shown
    assert "model.layers.0.self_attn.k_proj" in shown
    assert shown.strip().splitlines()[-1].startswith("all")
    written = json.loads(found.to_json())
    assert written["whole"]["relative"] == found.whole.relative
    first = next(x for x in written["layers"] if x["module"] == "model.layers.0.self_attn.k_proj")
    assert (first["norm_a"], first["cosine"]) == (0.0, None)
    with pytest.raises(RankfoldError, match=r"is an adapter and .* is not"):
        diff(a, bases["llama"])
