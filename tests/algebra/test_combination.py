"""Sums of adapters: what is on the disk against W' − W of the merged models in float64, and every refusal."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rankfold.algebra import combine, diff
from rankfold.algebra.combination import Term, combined, weighted_sum
from rankfold.algebra.merging import agreed_mean, dropped, largest
from rankfold.errors import RankfoldError
from rankfold.fold import fold_adapter, read_source
from rankfold.kernel.factors import Factors

Make = Callable[..., Path]


def changes(base: Path, adapter: Path) -> dict[str, Tensor]:
    """W' − W by module, merged by PEFT or by our layers in float64."""
    before = AutoModelForCausalLM.from_pretrained(base).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).double()
    merged = model.merge_and_unload()
    old = dict(before.named_parameters())
    return {n: p.detach() - old[n].detach() for n, p in merged.named_parameters() if not torch.equal(p, old[n])}


def assert_is_sum(base: Path, out: Path, terms: list[tuple[float, Path]], tolerance: float) -> None:
    found, wanted = changes(base, out), {}
    for weight, adapter in terms:
        for name, delta in changes(base, adapter).items():
            wanted[name] = wanted.get(name, 0) + weight * delta
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        assert (found[name] - delta).norm() <= tolerance * delta.norm(), name


PAIRS = [
    ("peft lora", "peft lora"), ("peft lora", "peft q, v"), ("peft rslora, patterns", "lora"), ("rasa", "sora"),
    ("rasa", "peft lora"), ("peft q", "peft q, v"), ("peft q, v", "peft q"), ("rasa q", "peft q, v"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_sum_is_exact(one: str, other: str, adapter: Make, bases: dict[str, Path], tmp_path: Path) -> None:
    a, b = adapter(one, 1), adapter(other, 2)
    report = combine([a, b], tmp_path / "out", weights=[0.7, -1.3])
    assert_is_sum(bases["llama"], tmp_path / "out", [(0.7, a), (-1.3, b)], 1e-6)
    assert report.worst.frobenius < 1e-6
    assert report.worst_of("algebra") < 1e-14
    assert report.worst_of("truncation") == 0
    assert report.adapter == f"0.7·{a} − 1.3·{b}"
    assert json.loads((tmp_path / "out" / "fold_report.json").read_text())["worst_frobenius"] == report.worst.frobenius


def test_what_sglang_wants_beside_a_module_is_written(adapter: Make, tmp_path: Path) -> None:
    report = combine([adapter("peft q"), adapter("rasa q", 2)], tmp_path / "out", weights=[1, 1])
    assert any("modules of adapted types, or stacked with them" in note for note in report.notes)
    assert sum("v_proj.lora_A" in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors")) == 2


def test_the_source_is_exact_in_float64(adapter: Make) -> None:
    a, b = read_source(adapter("rasa")), read_source(adapter("peft rslora, patterns"))
    both = combined([Term("a", 0.25, a), Term("b", 2.0, b)])
    for name in both.adapted:
        wanted = 0.25 * a.update(name).delta() + 2 * b.update(name).delta()  # pyright: ignore
        assert (both.update(name).delta() - wanted).norm() < 1e-14 * wanted.norm()  # pyright: ignore


def test_dora_is_compressed_or_refused(adapter: Make, bases: dict[str, Path], tmp_path: Path) -> None:
    a, b = adapter("peft dora"), adapter("peft lora", 2)
    with pytest.raises(RankfoldError, match=r"--error 0\.01, or how large with --rank"):
        combine([a, b], tmp_path / "out", weights=[1, 1])
    assert not (tmp_path / "out").exists()
    report = combine([a, b], tmp_path / "out", weights=[1, 0.5], error=1e-9)
    assert report.worst_of("truncation") <= 1e-9
    assert_is_sum(bases["llama"], tmp_path / "out", [(1, a), (0.5, b)], 1e-5)


def test_compression_says_what_it_cut(adapter: Make, bases: dict[str, Path], tmp_path: Path) -> None:
    a, b = adapter("peft lora", 1), adapter("peft lora", 2)
    report = combine([a, b], tmp_path / "out", weights=[1, 1], rank=5)
    assert report.needed_rank == 5
    cut = {p.module: p.truncation for p in report.layers}
    found = changes(bases["llama"], tmp_path / "out")
    for name, delta in changes(bases["llama"], a).items():
        delta = delta + changes(bases["llama"], b)[name]
        sigma = torch.linalg.svdvals(delta)
        module = name.removesuffix(".weight")
        assert cut[module] == pytest.approx(float(sigma[5:].norm() / sigma.norm()), rel=1e-4)
        assert float((found[name] - delta).norm() / delta.norm()) == pytest.approx(cut[module], rel=1e-3)


@pytest.mark.parametrize("profile", ["compact", "merged"])
def test_every_profile(profile: str, adapter: Make, bases: dict[str, Path], tmp_path: Path) -> None:
    a, b = adapter("peft lora"), adapter("lora")
    report = combine([a, b], tmp_path / "out", weights=[1, 1], profile=profile, dtype="float32")
    assert report.worst.frobenius < 1e-5
    if profile == "compact":
        assert_is_sum(bases["llama"], tmp_path / "out", [(1, a), (1, b)], 1e-6)


def test_what_is_shared_needs_no_rank_and_what_cancels_keeps_its_digits() -> None:
    down = torch.randn(4, 9, dtype=torch.float64)
    one, other = (Factors(down, torch.randn(7, 4, dtype=torch.float64), scale=s) for s in (0.5, 3.0))
    both = weighted_sum([(2.0, one), (1.0, other)])
    assert isinstance(both, Factors)
    assert both.rank == 4  # of 8 side by side
    torch.testing.assert_close(both.delta(), 2 * one.delta() + other.delta(), rtol=1e-13, atol=1e-13)

    near = Factors(one.down, one.up + 1e-6 * torch.randn(7, 4, dtype=torch.float64), scale=0.5)
    small = weighted_sum([(1.0, near), (-1.0, one)])
    assert isinstance(small, Factors)
    rounded = small.balanced().to(torch.bfloat16).to(torch.float64)
    wanted = near.delta() - one.delta()
    assert (rounded.delta() - wanted).norm() < 0.01 * wanted.norm()  # of the factors side by side it would be 1000
    assert weighted_sum([(1.0, one), (-1.0, one)]).norm() == 0  # pyright: ignore


def test_refusals(adapter: Make, bases: dict[str, Path], tmp_path: Path) -> None:
    a, b, out = adapter("peft lora"), adapter("lora"), tmp_path / "out"
    with pytest.raises(RankfoldError, match="has 1 for 2 adapters; give one weight per adapter"):
        combine([a, b], out, weights=[1])
    with pytest.raises(RankfoldError, match="weights: nan is not a finite number"):
        combine([a, b], out, weights=[1, float("nan")])
    other = adapter("peft lora", 1, "other")
    with pytest.raises(RankfoldError, match=r"trained on base .*llama and .* on .*other.*--base FOLDER"):
        combine([a, other], out, weights=[1, 1])
    combine([a, other], out, weights=[1, 1], base=str(bases["llama"]))
    fold_adapter(b, tmp_path / "fold", probe=False)
    with pytest.raises(RankfoldError, match=r"out=.* holds the adapter itself"):
        combine([a, tmp_path / "fold"], tmp_path / "fold", weights=[1, 1], force=True)
    with pytest.raises(FileExistsError, match="replace it with --force"):
        combine([a, b], out, weights=[1, 1])
    wide = adapter("peft lora", 1, "wide")
    sources = [Term(str(p), 1.0, read_source(p)) for p in (a, wide)]
    with pytest.raises(RankfoldError, match=r"gate_proj is \(48, 32\) \(out, in\) in .* and \(64, 32\) in"):
        combined(sources)
    bare = adapter("peft lora", 3)
    tensors = load_file(bare / "adapter_model.safetensors")
    save_file({k.replace("model.model.", "model."): v for k, v in tensors.items()}, bare / "adapter_model.safetensors")
    config = json.loads((bare / "adapter_config.json").read_text())
    (bare / "adapter_config.json").write_text(json.dumps({**config, "task_type": None}))
    with pytest.raises(RankfoldError, match=r"call a module model\.layers\.0\S+ and layers\.0\S+: .*\(task_type\)"):
        combine([a, bare], out, weights=[1, 1], force=True)


def with_head(folder: Path, value: float) -> Path:
    """Adds a trained output head, as modules_to_save leaves it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["lm_head"]}))
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = torch.full((64, 32), value)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_one_trained_head_is_kept_and_two_are_refused(adapter: Make, tmp_path: Path) -> None:
    a, b = adapter("peft lora"), with_head(adapter("peft lora", 2), 0.5)
    report = combine([a, b], tmp_path / "out", weights=[1, 0.5])
    assert any("the trained head is that of" in note for note in report.notes)
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.lm_head.weight"], torch.full((64, 32), 0.5))
    with_head(a, 0.25)
    with pytest.raises(RankfoldError, match=r"both trained .*lm_head\.weight \(modules_to_save\)"):
        combine([a, b], tmp_path / "out", weights=[1, 0.5], force=True)


@pytest.mark.parametrize("order", [1, -1])
def test_the_vocabulary_of_one_adapter_is_kept(
    order: int, adapter: Make, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Of a resized base, which PEFT saves whole beside the adapter."""
    a, b = adapter("peft q, v"), tmp_path / "more words"
    base = AutoModelForCausalLM.from_pretrained(bases["llama"])
    base.resize_token_embeddings(70, mean_resizing=False)
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(b, save_embedding_layers=True)
    trained = load_file(b / "adapter_model.safetensors")
    with pytest.raises(RankfoldError, match=r"\.weight with 70 rows.*fold with --profile merged"):
        combine([a, b][::order], tmp_path / "out", weights=[1, 1])
    report = combine([a, b][::order], tmp_path / "out", weights=[1, 1], profile="merged")
    assert any(f"the embeddings are those of {b} as they are" in note for note in report.notes)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(found[key], trained[f"base_model.model.{key}"])
    assert any("whole embeddings" in note for note in diff(a, b).notes)
    save_file({k: v if "lora" in k else v + 1 for k, v in trained.items()}, a / "adapter_model.safetensors")
    with pytest.raises(RankfoldError, match=r"both hold base_model\.model\.\S+ whole"):
        combine([a, b][::order], tmp_path / "no", weights=[1, 1], profile="merged")
    with_head(adapter("peft q, v"), 0.5)
    with pytest.raises(RankfoldError, match=r"both hold base_model\.model\.lm_head\.weight whole"):
        combine([a, b][::order], tmp_path / "no", weights=[1, 1], profile="merged")


def test_ties_and_dare(adapter: Make, bases: dict[str, Path], tmp_path: Path) -> None:
    a, b = adapter("peft lora", 1), adapter("peft lora", 2)
    with pytest.raises(RankfoldError, match=r"density=None must be in \(0, 1\] for combination='ties'"):
        combine([a, b], tmp_path / "out", weights=[1, 1], combination="ties", rank=8)
    with pytest.raises(RankfoldError, match=r"to a LoRA|with --rank N"):
        combine([a, b], tmp_path / "out", weights=[1, 1], combination="ties", density=0.3)
    report = combine([a, b], tmp_path / "out", weights=[1, 0.5], combination="ties", density=0.3, error=1e-9)
    assert report.worst_of("truncation") <= 1e-9
    found, one, other = (changes(bases["llama"], p) for p in (tmp_path / "out", a, b))
    for name in found:
        x, y = largest(one[name], 0.3), 0.5 * largest(other[name], 0.3)
        assert int((x != 0).sum()) == round(0.3 * x.numel())
        wanted = torch.where(x * y > 0, (x + y) / 2, torch.where(x.abs() >= y.abs(), x, y))
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-6)
    for again in ("one", "two"):
        combine([a, b], tmp_path / again, weights=[1, 1], combination="dare_linear", density=0.5, rank=16)
    files = [(tmp_path / again / "adapter_model.safetensors").read_bytes() for again in ("one", "two")]
    assert files[0] == files[1]


def test_the_rules() -> None:
    assert largest(torch.tensor([[1.0, -3.0], [2.0, 0.5]]), 0.5).tolist() == [[0, -3], [2, 0]]
    mean = agreed_mean(torch.tensor([[1.0, -2.0, 0.0, 4.0], [3.0, 1.0, 0.0, 0.0]]))
    assert mean.tolist() == [2, -2, 0, 4]
    kept = dropped(torch.ones(200, 200), 0.25, torch.Generator().manual_seed(0))
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    assert float(kept.mean()) == pytest.approx(1, abs=0.05)
