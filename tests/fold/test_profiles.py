"""Every format beside `uniform`, read back by what reads it or, where that cannot run here, by its formula."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Zamba2Config,
    Zamba2ForCausalLM,
)

from rankfold import PlainLoraConfig, RasaConfig, SoraConfig
from rankfold.cli import main
from rankfold.errors import RankfoldError
from rankfold.fold import PROFILES, fold_adapter, fold_model
from rankfold.host.peft_api import exact_pattern

TOKENS = torch.arange(5, 21)[None]
LLAMA = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, initializer_range=0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LLAMA).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)).save_pretrained(folder)
    return folder


def rasa(**kwargs) -> RasaConfig:
    defaults = {"r": 4, "shared_rank": 1, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return RasaConfig(init_lora_weights=False, **{**defaults, **kwargs})


def live(base: Path, config) -> PeftModel:
    return get_peft_model(AutoModelForCausalLM.from_pretrained(base), deepcopy(config)).eval()


def pruned(base: Path) -> PeftModel:
    """SoRA whose modules have ranks 0 to 8 left, each from its own place in the model."""
    config = SoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    config.allow_unscheduled = True
    model = live(base, config)
    gates = [p for n, p in model.named_parameters() if n.endswith("gate")]
    with torch.no_grad():
        for i, gate in enumerate(gates):
            gate[: i % 9] = 0
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def stock_peft(base: Path, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)


# compact ----------------------------------------------------------------------------------------------------------------


def test_compact_keeps_every_rank_and_the_logits(llama: Path, tmp_path: Path) -> None:
    model = pruned(llama)
    report = fold_model(model, tmp_path / "out", profile="compact")
    assert {p.rank for p in report.layers} == set(range(9))
    found = stock_peft(llama, tmp_path / "out")
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-5)
    for proof in report.layers:  # layers.1 is not layers.11's ending, and so on for twelve layers
        lora = found.get_submodule(f"base_model.model.{proof.module}").lora_A["default"]
        assert lora.out_features == max(proof.rank, 1), proof.module
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["alpha_pattern"] == {}
    assert config["r"] == report.rank == 8
    assert isinstance(config["lora_alpha"], int)
    assert "SGLang" in report.notes[-1]
    uniform = fold_model(model, tmp_path / "uniform")
    assert report.parameters < 0.6 * uniform.parameters
    assert report.worst.frobenius < 1e-6


def test_compact_in_half_precision_rounds_once(llama: Path, tmp_path: Path) -> None:
    """B carries rank/α, but the error is that of the uniform fold, not twice it."""
    model = pruned(llama)
    compact = fold_model(model, tmp_path / "compact", profile="compact", dtype="bfloat16")
    uniform = fold_model(model, tmp_path / "uniform", dtype="bfloat16")
    mean = [sum(p.frobenius for p in r.layers) / len(r.layers) for r in (compact, uniform)]
    assert mean[0] == pytest.approx(mean[1], rel=0.1)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)


class Nested(nn.Module):
    """`proj` and `inner.proj`: one name is the other's ending."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.inner = nn.Linear(8, 8), Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.proj(self.proj(x))


def test_a_pattern_matches_one_module(tmp_path: Path) -> None:
    base = Nested()
    model = get_peft_model(
        deepcopy(base),
        PlainLoraConfig(
            r=4, rank_pattern={"inner.proj": 6, "^proj": 2}, target_modules=["proj"], init_lora_weights=False
        ),
    ).eval()
    fold_model(model, tmp_path / "out", profile="compact")
    pattern = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["rank_pattern"]
    assert pattern == {"^proj": 2}
    found = PeftModel.from_pretrained(deepcopy(base), tmp_path / "out").eval()
    x = torch.randn(3, 8)
    torch.testing.assert_close(found(x), model(x), rtol=1e-5, atol=1e-5)
    assert exact_pattern("h.1.attn") == r"^h\.1\.attn"


# merged -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_merged_is_a_whole_model(base: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch) -> None:
    monkeypatch.setattr("rankfold.fold.profiles.merged.MAX_SHARD", "50KB")
    folder = request.getfixturevalue(base)
    config = rasa(target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True) if base == "gpt2" else rasa()
    model = live(folder, config)
    model.save_pretrained(tmp_path / "adapter")
    (folder / "tokenizer_config.json").write_text('{"mark": 1}')
    report = fold_adapter(tmp_path / "adapter", tmp_path / "out", profile="merged")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"mark": 1}'
    (folder / "tokenizer_config.json").unlink()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-5)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert report.worst.frobenius < 1e-6
    assert report.probe["max_logit_error"] < 1e-4  # type: ignore[operator]
    assert "a merged model" in report.summary()
    assert not report.notes
    assert report.parameters == sum(p.numel() for p in found.parameters())


def test_merged_in_bfloat16_says_how_much_of_the_update_is_lost(llama: Path, tmp_path: Path) -> None:
    model = live(llama, rasa())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and name.endswith("up"):
                p.mul_(1e-3)
    report = fold_model(model, tmp_path / "out", profile="merged", dtype="bfloat16")
    base = AutoModelForCausalLM.from_pretrained(llama)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert next(saved.parameters()).dtype == torch.bfloat16
    name = report.worst.module
    delta = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default").detach().double()
    lost = saved.get_submodule(name).weight.double() - base.get_submodule(name).weight.double() - delta
    assert report.worst.frobenius == pytest.approx(float((lost.norm() / delta.norm()).detach()), rel=1e-4)
    assert report.worst.frobenius > 0.1
    assert max(p.algebra for p in report.layers) < 1e-14
    assert "no tokenizer" in report.notes[0]
    assert "relative to ΔW" in report.notes[1]


def test_merged_takes_the_head_along(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    BertModel(config).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    model = get_peft_model(base, rasa(target_modules=["query", "attention.output.dense"], task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "adapter")
    report = fold_adapter(tmp_path / "adapter", tmp_path / "out", profile="merged")
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-5)
    assert report.probe["max_logit_error"] < 1e-5  # type: ignore[operator]


def test_merging_into_tied_embeddings_is_refused(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": True})).save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = live(tmp_path / "base", rasa(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="shares its weight"):
        fold_model(model, tmp_path / "out", profile="merged")
    with pytest.raises(ValueError, match="lm_head is the output head"):
        fold_model(model, tmp_path / "out", profile="gguf")
    with pytest.raises(ValueError, match="lm_head is the output head"):
        fold_model(model, tmp_path / "out", profile="mlx")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("targets", [["q_proj"], ["layers.1.shared_transformer.self_attn.q_proj"]])
def test_merging_into_tied_layers_is_refused(targets: list[str], tmp_path: Path) -> None:
    """The hybrid layers of Zamba2 are one set of weights; the LoRA of one of them is not that of the others."""
    config = Zamba2Config(
        vocab_size=64, hidden_size=16, num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2, hybrid_layer_ids=[1, 3],
        num_mem_blocks=1, mamba_d_state=8, mamba_ngroups=1, n_mamba_heads=4, mamba_headdim=8, intermediate_size=24,
        num_attention_heads=2, num_key_value_heads=2, attention_head_dim=16, adapter_rank=4, chunk_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    Zamba2ForCausalLM(config).save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora).save_pretrained(
        str(tmp_path / "adapter")
    )
    with pytest.raises(
        RankfoldError, match=r"layers\.1\.\S+ shares its weight with \S+layers\.3\.\S+, which would change too"
    ):
        fold_adapter(tmp_path / "adapter", tmp_path / "out", profile="merged")
    assert len(fold_adapter(tmp_path / "adapter", tmp_path / "out", probe=False).layers) == (
        2 if targets == ["q_proj"] else 1
    )


def test_an_adapted_output_head_is_written_where_it_is_read(llama: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        live(llama, rasa(target_modules=["q_proj", "lm_head"])).save_pretrained(str(tmp_path / "adapter"))
    for profile in ("gguf", "mlx"):
        with pytest.raises(ValueError, match="lm_head is the output head"):
            fold_adapter(tmp_path / "adapter", tmp_path / "out", profile=profile)
    for profile in ("uniform", "compact", "merged"):
        report = fold_adapter(tmp_path / "adapter", tmp_path / profile, profile=profile)
        assert report.probe["max_logit_error"] < 1e-4  # type: ignore[operator]


def test_an_untrained_adapter_says_so(llama: Path, tmp_path: Path) -> None:
    report = fold_model(
        live(llama, RasaConfig(r=4, shared_rank=1, target_modules="all-linear", task_type="CAUSAL_LM")),
        tmp_path / "out",
    )
    assert any("changes nothing" in note for note in report.notes)


@pytest.mark.parametrize("kept", ["lm_head", "embed_tokens"])
def test_merging_a_trained_head_into_tied_embeddings_is_refused(kept: str, tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": True})).save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = live(tmp_path / "base", rasa(target_modules=["q_proj"], modules_to_save=[kept]))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "modules_to_save" in n).add_(1)
    with pytest.raises(
        ValueError, match=f"{kept}.weight, which the adapter saved in modules_to_save, shares its weight"
    ):
        fold_model(model, tmp_path / "out", profile="merged")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


# mlx --------------------------------------------------------------------------------------------------------------------


def test_mlx_says_what_it_makes_of_theta(tmp_path: Path) -> None:
    config = LlamaConfig(**{**LLAMA.to_dict(), "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    report = fold_model(live(tmp_path / "base", rasa()), tmp_path / "out", profile="mlx")
    assert "mlx-lm takes theta 10000 for this base; write rope_theta: 100000.0" in report.notes[0]


def test_mlx_by_its_formula(llama: Path, tmp_path: Path) -> None:
    """y = x Wᵀ + scale · (x a) b, for the blocks and keys that mlx-lm would adapt: the last num_layers ones."""
    model = live(llama, rasa(target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 3, 4]))
    report = fold_model(model, tmp_path / "out", profile="mlx")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == LLAMA.num_hidden_layers
    parameters = config["lora_parameters"]
    assert parameters["keys"] == ["mlp.down_proj", "self_attn.q_proj"]
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    base = AutoModelForCausalLM.from_pretrained(llama)
    for block in base.model.layers[-config["num_layers"] :]:
        for key in parameters["keys"]:
            linear = block.get_submodule(key)
            prefix = next(n for n, m in base.named_modules() if m is linear)
            a, b = tensors.pop(f"{prefix}.lora_a"), tensors.pop(f"{prefix}.lora_b")
            assert a.shape == (linear.in_features, parameters["rank"])
            assert b.shape == (parameters["rank"], linear.out_features)

            def forward(x: torch.Tensor, w=linear.weight, a=a, b=b, scale=parameters["scale"]) -> torch.Tensor:
                return x @ w.T + scale * ((x @ a) @ b)

            linear.forward = forward
    assert not tensors
    torch.testing.assert_close(logits(base), logits(model), rtol=1e-5, atol=1e-5)
    assert not report.notes


# gguf -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gguf_holds_the_factors_in_llama_cpps_order(dtype: str, llama: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="pip install 'rankfold[gguf]'")
    model = pruned(llama)
    report = fold_model(model, tmp_path / "out", profile="gguf", dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    meta = {key: field.contents() for key, field in reader.fields.items()}
    assert meta["general.type"] == "adapter"
    assert meta["general.architecture"] == "llama"
    assert meta["adapter.type"] == "lora"
    assert meta["adapter.lora.alpha"] == report.rank == 8
    short = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    tensors = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    assert {t.tensor_type.name for t in reader.tensors} == {{"float": "F", "bfloat": "BF"}[dtype[:-2]] + dtype[-2:]}
    alive = [p for p in report.layers if p.rank]
    assert len(tensors) == 2 * len(alive) < 2 * len(report.layers)
    eps = torch.finfo(getattr(torch, dtype)).eps
    for proof in alive:
        _, _, block, module = proof.module.split(".", 3)
        down = tensors[f"blk.{block}.{short[module]}.weight.lora_a"]
        up = tensors[f"blk.{block}.{short[module]}.weight.lora_b"]
        trained = model.get_submodule(f"base_model.model.{proof.module}").get_delta_weight("default").detach()
        if heads := {"q_proj": 4, "k_proj": 2}.get(module.removeprefix("self_attn.")):
            # row 2i+j of a head there is row j·d/2+i here: the rotary embedding pairs neighbours there, halves here
            d = trained.shape[0] // heads
            rows = [h * d + j * (d // 2) + i for h in range(heads) for i in range(d // 2) for j in range(2)]
            trained = trained[rows]
        torch.testing.assert_close(up @ down, trained, rtol=0, atol=4 * eps * float(trained.abs().max()) + 1e-6)


@pytest.mark.parametrize("profile", ["gguf", "mlx"])
def test_an_architecture_that_is_not_known_is_refused(profile: str, gpt2: Path, tmp_path: Path) -> None:
    model = live(gpt2, rasa(target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(ValueError, match=r"model_type='gpt2' is not among .* fold with --profile"):
        fold_model(model, tmp_path / "out", profile=profile)
    assert list(tmp_path.iterdir()) == []


def test_gguf_without_its_package(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankfold.io.gguf_names.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'rankfold\[gguf\]'"):
        fold_model(live(llama, rasa()), tmp_path / "out", profile="gguf")
    assert list(tmp_path.iterdir()) == []


# all --------------------------------------------------------------------------------------------------------------------


def test_an_unknown_profile(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="profile='onnx' must be one of uniform, compact, per_expert, gguf, mlx, merged"
    ):
        fold_model(live(llama, rasa()), tmp_path / "out", profile="onnx")
    assert list(tmp_path.iterdir()) == []


SAVERS = {
    "compact": "rankfold.fold.profiles.compact.save_file",
    "mlx": "rankfold.fold.profiles.mlx.save_file",
    "gguf": "gguf.GGUFWriter.write_tensors_to_file",
    "merged": "transformers.PreTrainedModel.save_pretrained",
}


@pytest.mark.parametrize("profile", SAVERS)
def test_a_full_disk_leaves_nothing(profile: str, llama: Path, tmp_path: Path, monkeypatch) -> None:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SAVERS[profile], full)
    with pytest.raises(OSError, match="No space left"):
        fold_model(live(llama, rasa()), tmp_path / "out", profile=profile)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("profile", PROFILES)
def test_on_the_command_line(profile: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    live(llama, rasa()).save_pretrained(tmp_path / "adapter")
    code = main(["fold", str(tmp_path / "adapter"), "-o", str(tmp_path / "out"), "--profile", profile])
    said = capsys.readouterr().out
    assert code == 0
    assert f"into {PROFILES[profile].noun}" in said
    assert f"library_name: {PROFILES[profile].library}" in (tmp_path / "out" / "README.md").read_text()
    probed = PROFILES[profile].loads_as != "nothing"
    assert ("probe: largest logit difference" in said) == probed
    written = json.loads((tmp_path / "out" / "fold_report.json").read_text())
    assert written["worst_frobenius"] < 1e-6
    assert set(written["sha256"]) == {p.name for p in (tmp_path / "out").iterdir()} - {"fold_report.json", "README.md"}
