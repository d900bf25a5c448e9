"""Compression: optimal, within its budget, weighted by what the modules see; the proof tells it apart; strict."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rankfold.fold
from rankfold import RasaConfig
from rankfold.algebra import diff
from rankfold.cli import main
from rankfold.errors import RankfoldError
from rankfold.fold import fold_adapter, fold_model
from rankfold.fold.calibration import read_texts, second_moments, tokenise
from rankfold.fold.compression import CompressionLimit, compress, weighted_error
from rankfold.fold.proof import prove
from rankfold.fold.source import Update
from rankfold.kernel.factors import Factors

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXTS = ["w7 w9 w30 w12 w5", "w40 w41 w42 w43 w9 w9", "w3 w7 w61 w20"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def updates() -> dict[str, Update]:
    """A decaying spectrum, as factors and as matrices, wide and tall."""
    gate = 0.6 ** torch.arange(10, dtype=torch.float64)
    wide = Factors(random(10, 30), random(20, 10, seed=1), gate, 0.7)
    tall = Factors(random(10, 20), random(30, 10, seed=1), gate, 0.7)
    return {"wide": wide, "tall": tall, "wide matrix": wide.delta(), "tall matrix": tall.delta()}


def dense(update: Update) -> Tensor:
    return update.delta() if isinstance(update, Factors) else update


@pytest.mark.parametrize("name", updates())
@pytest.mark.parametrize("rank", [1, 4, 9, 50])
def test_the_best_of_its_rank(name: str, rank: int) -> None:
    """Eckart–Young: the error is what a dense SVD leaves."""
    update = updates()[name]
    folded = compress(update, CompressionLimit(rank=rank))
    best = torch.linalg.svdvals(dense(update))[rank:].norm()
    error = (folded.delta() - dense(update)).norm()
    assert folded.rank == min(rank, 10)
    torch.testing.assert_close(error, best, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", updates())
@pytest.mark.parametrize("error", [0.3, 0.01, 1e-7, 0.0])
def test_the_smallest_rank_within_an_error(name: str, error: float) -> None:
    update = updates()[name]
    folded = compress(update, CompressionLimit(error=error))
    sigma = torch.linalg.svdvals(dense(update))
    assert (folded.delta() - dense(update)).norm() <= error * sigma.norm() + 1e-11
    if error:
        assert sigma[folded.rank - 1 :].norm() > error * sigma.norm()


@pytest.mark.parametrize("name", updates())
def test_weighted_by_the_inputs(name: str) -> None:
    """No approximation of the rank has a smaller error of the output than ΔW C^½'s own truncation."""
    update = updates()[name]
    into = dense(update).shape[1]
    x = random(into, into, seed=3) * torch.logspace(0, -3, into, dtype=torch.float64)[:, None]
    moment = x @ x.T
    root = torch.linalg.cholesky(moment)
    for rank in (1, 3, 6):
        folded = compress(update, CompressionLimit(rank=rank), moment)
        best = torch.linalg.svdvals(dense(update) @ root)[rank:].norm() / (dense(update) @ root).norm()
        error = weighted_error(update, folded, moment)
        assert error == pytest.approx(float(best), rel=1e-5)
        assert error <= weighted_error(update, compress(update, CompressionLimit(rank=rank)), moment) + 1e-12
    folded = compress(update, CompressionLimit(error=0.05), moment)
    assert weighted_error(update, folded, moment) <= 0.05
    assert weighted_error(update, compress(update, CompressionLimit(rank=folded.rank - 1), moment), moment) > 0.05


def test_an_update_of_nothing() -> None:
    zero = Factors(torch.zeros(3, 8, dtype=torch.float64), torch.zeros(6, 3, dtype=torch.float64))
    assert compress(zero, CompressionLimit(error=0.1)).rank == 0
    assert not compress(zero.delta(), CompressionLimit(rank=2)).delta().any()
    assert prove("m", zero, zero, zero, cut=compress(zero, CompressionLimit(rank=1))).frobenius == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"error": 1.0}, "error=1.0 is relative"),
        ({"error": -0.1}, "error=-0.1 is relative"),
        ({"error": float("nan")}, "error=nan is relative"),
        ({"moments": {}}, "give rank or error"),
    ],
)
def test_bad_budgets(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressionLimit(**arguments)


# In a fold ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folder


def adapter(base: Path, tmp_path: Path, kind: str = "rasa") -> Path:
    configs = {
        "rasa": RasaConfig(r=8, shared_rank=2, target_modules=ALL, task_type="CAUSAL_LM", init_lora_weights=False),
        "loha": LoHaConfig(r=4, target_modules=ALL, task_type="CAUSAL_LM", init_weights=False),
        "dora": LoraConfig(r=4, use_dora=True, target_modules=ALL, task_type="CAUSAL_LM", init_lora_weights=False),
    }
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), configs[kind])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:  # starts where DoRA is plain LoRA
                p.mul_(1 + 0.2 * torch.rand_like(p))
    model.save_pretrained(tmp_path / kind)
    return tmp_path / kind


@pytest.mark.parametrize("kind", ["rasa", "loha", "dora"])
def test_a_fold_of_a_chosen_rank(kind: str, base: Path, tmp_path: Path) -> None:
    report = fold_adapter(adapter(base, tmp_path, kind), tmp_path / "out", rank=8, dtype="bfloat16")
    assert report.rank == 8
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 8
    for p in report.layers:
        assert p.frobenius == pytest.approx((p.truncation**2 + p.rounding**2) ** 0.5, rel=0.05)
        assert p.truncation > 0.01
        assert 1e-4 < p.rounding < 5e-3
        assert p.output is None
    assert "cut off by compression" in report.summary()
    assert "by rounding to bfloat16" in report.summary()
    assert json.loads(report.to_json())["worst_truncation"] == report.worst_of("truncation")
    assert report.probe["max_logit_error"] > 1e-3  # type: ignore[operator]


def test_a_fold_that_cuts_off_much_says_so(base: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path)
    summary = fold_adapter(folder, tmp_path / "out", rank=2, dtype="float32", probe=False).summary()
    lost = diff(folder, tmp_path / "out").whole.relative
    assert lost is not None
    assert lost > 0.3
    assert f"compression cut off {lost:.0%} of the update" in summary
    assert "compression cut off" not in fold_adapter(folder, tmp_path / "all", error=1e-3, probe=False).summary()


@pytest.mark.parametrize("kind", ["rasa", "loha", "dora"])
def test_a_fold_within_an_error(kind: str, base: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path, kind)
    report = fold_adapter(folder, tmp_path / "out", error=0.2, probe=False)
    assert 0 < report.worst_of("truncation") <= 0.2
    report = fold_adapter(folder, tmp_path / "full", rank=32)
    assert report.worst_of("truncation") < 1e-12  # at full rank it is exact
    assert report.probe["max_logit_error"] < 1e-4  # type: ignore[operator]


def test_calibration_keeps_the_outputs(base: Path, tmp_path: Path) -> None:
    """On the texts of the calibration every module's output error is no larger than without; files of both kinds read."""
    folder = adapter(base, tmp_path)
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS) + "\n\n")
    (tmp_path / "c.txt").write_text("\n\n".join(TEXTS))
    assert read_texts(tmp_path / "c.jsonl") == read_texts(tmp_path / "c.txt") == TEXTS
    plain = fold_adapter(folder, tmp_path / "plain", rank=4, probe=False)
    weighted = fold_adapter(folder, tmp_path / "weighted", rank=4, calibration=tmp_path / "c.jsonl", probe=False)
    assert "of the output" in weighted.summary()

    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    names = [p.module for p in plain.layers]
    moments = second_moments(trained.get_base_model(), names, tokenise(TEXTS, str(base), trained.config))
    errors = {}
    for name in ("plain", "weighted"):
        tensors = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), tmp_path / name
        ).get_base_model()
        errors[name] = []
        for module in names:
            layer, original = tensors.get_submodule(module), trained.get_base_model().get_submodule(module)
            folded = Factors(layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double())
            update = original.lowrank_adapters["default"].factors().detach().to(torch.float64)
            errors[name].append(weighted_error(update, folded.detach(), moments[module].double()))
    better = [w <= p * 1.001 for w, p in zip(errors["weighted"], errors["plain"], strict=True)]
    assert all(better)
    assert sum(errors["weighted"]) < 0.7 * sum(errors["plain"])
    stated = [p.output for p in weighted.layers]
    assert stated == pytest.approx(errors["weighted"], rel=0.05, abs=0.02)  # the report's has the ridge

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    live = fold_model(model, tmp_path / "live", rank=4, calibration=tmp_path / "c.txt")
    assert [p.output for p in live.layers] == pytest.approx(stated, rel=1e-4)
    within = fold_adapter(folder, tmp_path / "within", error=0.1, calibration=tmp_path / "c.txt", probe=False)
    assert within.worst_of("output") <= 0.1 + 1e-9


def test_second_moments_are_means_of_outer_products(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    seen: list[Tensor] = []
    hook = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, x: seen.append(x[0].flatten(0, 1)))
    found = second_moments(model, ["model.layers.0.mlp.down_proj"], tokenise(TEXTS, str(base), model.config))
    hook.remove()
    x = torch.cat(seen)
    torch.testing.assert_close(found["model.layers.0.mlp.down_proj"], x.T @ x / len(x))
    assert not model.model.layers[0].mlp.down_proj._forward_pre_hooks


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "holds no text"),
        ('{"text": "w1"}\n{"prompt": "w2"}', 'line 2: every line must be like {"text"'),
        ('{"text": "w1"}\nnot json', "line 2"),
        ('{"text": 3}', "line 1"),
    ],
)
def test_bad_calibration_files(content: str | None, message: str, base: Path, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "c.jsonl").write_text(content)
    folder = adapter(base, tmp_path)
    with pytest.raises(ValueError, match=message):
        fold_adapter(folder, tmp_path / "out", rank=4, calibration=tmp_path / "c.jsonl")
    assert not (tmp_path / "out").exists()


def test_calibration_fits_the_model(base: Path) -> None:
    """Long texts are cut to the model's positions; ids beyond its vocabulary and texts without tokens are one clear error."""
    short = LlamaConfig(max_position_embeddings=7)
    assert tokenise(["w1 " * 30], str(base), short)[0].shape == (1, 7)
    with pytest.raises(ValueError, match="its tokenizer gives id"):
        tokenise(TEXTS, str(base), LlamaConfig(vocab_size=1))
    with pytest.raises(ValueError, match="makes no tokens"):
        tokenise([" "], str(base), short)


def test_calibration_without_a_budget_or_a_tokenizer(base: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path)
    (tmp_path / "c.txt").write_text(TEXTS[0])
    with pytest.raises(ValueError, match="give rank or error with it"):
        fold_adapter(folder, tmp_path / "out", calibration=tmp_path / "c.txt")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare").mkdir(exist_ok=True)
        (tmp_path / "bare" / name).write_bytes((base / name).read_bytes())
    with pytest.raises(ValueError, match="has no tokenizer"):
        fold_adapter(folder, tmp_path / "out", rank=4, base=str(tmp_path / "bare"), calibration=tmp_path / "c.txt")


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens is of kind 'embedding'"),
        (
            {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]},
            "q_proj.weight is of kind 'parameter'",
        ),
    ],
    ids=["embedding", "parameter"],
)
@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's own
def test_calibration_is_of_linear_layers(
    fields: dict, kind: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ids of an embedding are not a vector, and PEFT's layer of a parameter is not a module; said before a model is loaded."""
    config = LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **fields)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    (tmp_path / "c.txt").write_text("\n\n".join(TEXTS))
    monkeypatch.setattr(rankfold.fold, "trained_model", lambda *_: pytest.fail("the base was loaded"))
    for fold in (lambda: fold_adapter(tmp_path / "a", tmp_path / "out", rank=2, calibration=tmp_path / "c.txt"),
                 lambda: fold_model(model, tmp_path / "out", rank=2, calibration=tmp_path / "c.txt")):  # fmt: skip
        with pytest.raises(RankfoldError, match=kind):
            fold()


def test_calibration_of_a_module_that_is_not_there(base: Path) -> None:
    """A file may name experts one by one, which transformers fuses."""
    with pytest.raises(RankfoldError, match=r"LlamaForCausalLM has no module experts\.0\.w1"):
        second_moments(
            AutoModelForCausalLM.from_pretrained(base), ["experts.0.w1"], [torch.ones(1, 2, dtype=torch.long)]
        )


def test_strict_writes_nothing(base: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path)
    with pytest.raises(ValueError, match=r"strict=0.01: the relative error of model\.\S+ is .*of which compression"):
        fold_adapter(folder, tmp_path / "out", rank=4, strict=0.01)
    with pytest.raises(ValueError, match=r"strict=1e-05.*rounding to torch\.bfloat16"):
        fold_adapter(folder, tmp_path / "out", dtype="bfloat16", strict=1e-5)
    with pytest.raises(ValueError, match="strict=0 must be"):
        fold_adapter(folder, tmp_path / "out", strict=0)
    assert [p.name for p in tmp_path.iterdir()] == ["rasa"]
    fold_adapter(folder, tmp_path / "out", dtype="bfloat16", strict=0.01, probe=False)


def test_the_command(base: Path, tmp_path: Path, capsys) -> None:
    """The flags reach the fold; an error is one line, status 1, and nothing is written."""
    folder, out = str(adapter(base, tmp_path, "dora")), str(tmp_path / "out")
    with warnings.catch_warnings():
        assert main(["fold", folder, "-o", out]) == 1
        assert "error: peft:dora: its update is not a product of small matrices" in capsys.readouterr().err
        assert main(["fold", folder, "-o", out, "--rank", "8", "--strict"]) == 1
        assert "error: strict=0.01: the relative error of model." in capsys.readouterr().err
        assert not Path(out).exists()
        (tmp_path / "c.txt").write_text(TEXTS[0])
        flags = ["--error", "0.05", "--calibration", str(tmp_path / "c.txt"), "--strict", "0.5", "--no-probe"]
        assert main(["fold", folder, "-o", out, *flags]) == 0
    assert "of the output" in capsys.readouterr().out


def test_compression_decomposes_nothing_as_large_as_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """RaSA at r=32, k=4, L=32 has folded rank 156: what is decomposed is 156 × 156, whatever the weight."""
    sizes: list[int] = []
    for name in ("svd", "eigh"):
        real = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda a, *args, real=real, **kw: (sizes.append(max(a.shape)), real(a, *args, **kw))[1]
        )
    wide = Factors(random(156, 1024), random(2048, 156, seed=1))
    assert compress(wide, CompressionLimit(rank=32)).rank == 32
    assert compress(wide, CompressionLimit(rank=32), torch.eye(1024, dtype=torch.float64)).rank == 32
    assert sizes == [156, 156]
