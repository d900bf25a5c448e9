"""Counts of a plan against adapters that were really built, saved and folded; and what is said of the base."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoHaConfig, LoraConfig, PeftConfig, PeftModel, VBLoRAConfig, VeraConfig, get_peft_model
from shapes import CONFIGS, folder, real

from rankfold import AdaSvdConfig, PlainLoraConfig, RasaConfig
from rankfold.fold import fold_adapter
from rankfold.host import registry
from rankfold.io.models import ModelError
from rankfold.methods.cora_subspace import content_hash, write_subspace
from rankfold.plan.base_facts import describe
from rankfold.plan.candidates import everyone
from rankfold.plan.cost import cost
from rankfold.plan.folding import Fold
from rankfold.plan.meta import meta_model
from rankfold.train import budget

CANDIDATES = {c.label: c.with_rank(4) for c in everyone()}
TASKS = {"bert": "classification"}
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn"], "bert": ["query", "value"], "t5": ["q", "wo"], "vit": ["fc1"]}  # fmt: skip


def basis(base: torch.nn.Module, targets: list[str], path: Path) -> str:
    """A basis file for the targets of a model, as `rankfold subspace` writes them."""
    tensors = {}
    for name, m in base.named_modules():
        if name.rpartition(".")[2] in targets:
            out = m.weight.shape[1] if isinstance(m, hf.pytorch_utils.Conv1D) else m.weight.shape[0]  # pyright: ignore
            tensors |= {f"{name}.basis": torch.eye(int(out), 8), f"{name}.sigma": torch.ones(8).double()}
    about = {"version": 1, "scope": "module", "source": "weights", "scale": "none", "rank": 8, "base": None}
    write_subspace(path, tensors, about | {"targets": targets, "models": [], "gaps": {}, "hash": content_hash(tensors)})
    return str(path)


def built(name: str, config: PeftConfig, shake: bool = True) -> PeftModel:
    """The adapter on a model with weights, moved off its first values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(real(name), config)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and shake:
                p.add_(torch.randn_like(p) * 0.1)
        for name, b in model.named_buffers():
            if ".links_" in name and shake:  # which a plan counts as trained already
                b.add_(torch.randn_like(b) * 0.1)
    return model


def test_every_method_is_planned() -> None:
    assert registry.METHODS.keys() <= {c.name for c in CANDIDATES.values()}


@pytest.mark.parametrize("arch", CONFIGS)
@pytest.mark.parametrize("label", CANDIDATES)
def test_counts_are_those_of_the_adapter(label: str, arch: str, tmp_path: Path) -> None:
    task, candidate = TASKS.get(arch), CANDIDATES[label]
    base = meta_model(str(folder(tmp_path / "base", arch)), task)
    planned = candidate.config(base, task, TARGETS[arch])
    if arch == "gpt2" and label in ("peft:loha", "peft:lokr"):
        with pytest.raises(ValueError, match="Conv1D'> not supported"):
            cost(base, planned)
        return
    found = cost(base, planned)

    config = planned
    if candidate.name == "cora":
        fields = {"basis": basis(real(arch), TARGETS[arch], tmp_path / "basis.safetensors"), **candidate.fields}
        config = registry.get("cora").config(
            **fields, target_modules=TARGETS[arch], task_type=planned.task_type, modules_to_save=planned.modules_to_save
        )
    if hasattr(config, "allow_unscheduled"):
        config.allow_unscheduled = True  # pyright: ignore[reportAttributeAccessIssue]
    model = built(arch, config)
    spent = budget.count(model)
    assert (found.trained, found.head) == (spent.adapter, spent.head)
    assert found.optimizer_bytes == spent.memory()["optimiser"]
    assert found.head == (32 * 2 + 2 if arch == "bert" else 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(tmp_path / "adapter"))
        assert found.stored == budget.stored(tmp_path / "adapter")[0]
        assert found.flops is not None
        assert 0 < found.flops[0] < 20
        if isinstance(found.fold, str):
            assert ("dense" in found.fold) == (label == "peft:dora")
            assert ("--approximate bi|bw" in found.fold) == (label in ("res_lora is", "res_lora ms"))
            return
        report = fold_adapter(tmp_path / "adapter", tmp_path / "folded", base=str(tmp_path / "base"), probe=False)
    assert (report.needed_rank, report.rank) == (found.fold.rank, found.fold.served)
    assert report.parameters == found.folded


@pytest.mark.parametrize("config", [PlainLoraConfig, LoraConfig])
def test_zeros_beside_an_adapter_are_counted(config: type[PeftConfig], tmp_path: Path) -> None:
    """SGLang wants v_proj beside q_proj, and gate_proj beside up_proj."""
    base = folder(tmp_path / "base", "llama")
    made = config(r=8, target_modules=["q_proj", "up_proj"])  # pyright: ignore[reportCallIssue]
    found = cost(meta_model(str(base)), made)
    built("llama", made).save_pretrained(str(tmp_path / "adapter"))
    report = fold_adapter(tmp_path / "adapter", tmp_path / "folded", base=str(base), probe=False)
    assert found.folded == report.parameters > found.trained


def test_a_method_that_looks_at_values_while_it_trains(tmp_path: Path) -> None:
    made = VBLoRAConfig(r=4, vector_length=8, target_modules=["q_proj"])
    found = cost(meta_model(str(folder(tmp_path / "base", "llama"))), made)
    assert found.trained == budget.count(built("llama", made)).adapter
    assert isinstance(found.fold, Fold)
    assert found.flops is None  # which take place in training


def test_a_real_model_is_counted_and_left_alone(tmp_path: Path) -> None:
    model, config = real("llama"), RasaConfig(r=4, target_modules="all-linear")
    state, fields, draws = dict(model.state_dict()), dict(vars(config)), torch.get_rng_state()
    assert cost(model, config) == cost(meta_model(str(folder(tmp_path, "llama"))), config)
    assert model.state_dict().keys() == state.keys()
    assert vars(config) == fields
    assert torch.equal(draws, torch.get_rng_state())


def test_operations_by_formula(tmp_path: Path) -> None:
    """2q(in + out) forward and 6q(in + out) with backward, over 2·in·out and 4·in·out, all linear layers in the base."""
    base = meta_model(str(folder(tmp_path, "llama")))
    every = [m for m in base.modules() if isinstance(m, torch.nn.Linear)]
    whole = sum(2 * m.in_features * m.out_features for m in every)
    pairs = sum(m.in_features + m.out_features for m in every[:-1])  # the last is the output head
    for config in (LoraConfig(r=4, target_modules="all-linear"), PlainLoraConfig(r=4, target_modules="all-linear")):
        assert cost(base, config).flops == pytest.approx((2 * 4 * pairs / whole, 6 * 4 * pairs / (2 * whole)))
    frozen = cost(base, VeraConfig(r=4, target_modules="all-linear"))
    assert frozen.flops == pytest.approx((2 * 4 * pairs / whole, 4 * 4 * pairs / (2 * whole)))
    dense = cost(base, LoHaConfig(r=4, target_modules="all-linear")).flops
    assert dense is not None
    assert dense[0] > 0.8


def test_a_method_whose_ranks_fall_is_shown_at_both_ends(tmp_path: Path) -> None:
    base = meta_model(str(folder(tmp_path, "llama")))
    found = cost(base, AdaSvdConfig(r=6, target_r=4, target_modules=["q_proj"]))
    assert (found.trained, found.trained_at_end) == (2 * 6 * (64 + 1), 2 * 4 * (64 + 1))


def test_a_lora_on_the_output_head_has_a_fold(tmp_path: Path) -> None:
    base = meta_model(str(folder(tmp_path, "llama")))
    for config in (PlainLoraConfig(target_modules=["lm_head"]), LoraConfig(target_modules=["lm_head"])):
        found = cost(base, config).fold
        assert isinstance(found, Fold)
        assert (found.rank, found.served) == (8, 8)


QUANTISED: dict[str, tuple[dict[str, Any], float | None]] = {
    # bytes of a 64 × 64 weight
    "bitsandbytes, 4 bits": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 2048 + 4 * 64 + 64),
    "bitsandbytes, 8 bits": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 4096 + 4 * 64),
    "gptq, 4 bits": ({"quant_method": "gptq", "bits": 4, "group_size": 32}, 2048 + 2 * 64 // 2 + 2 * 2 * 64 + 4 * 64),
    "awq, 4 bits": ({"quant_method": "awq", "bits": 4, "group_size": 32}, 2048 + 2 * 64 // 2 + 2 * 2 * 64),
    "hqq": ({"quant_method": "hqq"}, None),
}


@pytest.mark.parametrize("how", QUANTISED)
def test_a_quantised_base(how: str, tmp_path: Path) -> None:
    quantisation, one = QUANTISED[how]
    square = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 32}
    plain = meta_model(str(folder(tmp_path / "plain", "llama", **square)))
    base = meta_model(str(folder(tmp_path / "small", "llama", **square, quantization_config=quantisation)))
    facts, before = describe(base), describe(plain)
    assert facts.quantised == how
    assert facts.parameters == before.parameters
    if one is None:
        assert facts.bytes is None
        assert "bytes are not known" in facts.notes[0]
    else:
        assert before.bytes is not None
        assert facts.bytes == before.bytes - 2 * 7 * (4 * 4096 - one)
    config = RasaConfig(r=4, target_modules="all-linear")
    assert cost(base, config) == cost(plain, config)


def test_fused_experts_are_named(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 40,
    }
    config = hf.MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2)
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(tmp_path)
    base = meta_model(str(tmp_path))
    experts = 2 * 4 * 3 * 32 * 48
    linear = sum(m.weight.numel() for m in base.modules() if isinstance(m, torch.nn.Linear))
    assert describe(base).flops >= 2 * (linear + experts // 2)
    reached = cost(base, PlainLoraConfig(target_modules="all-linear"))
    assert isinstance(reached.fold, Fold)
    assert not any("experts" in note for note in reached.notes)
    spent = cost(base, PlainLoraConfig(target_modules=["q_proj"]))
    share = 100 * experts / base.num_parameters()
    assert f"no adapter on: fused experts, {share:.3g} % of the parameters (" in spent.notes[0]
    theirs = cost(base, LoraConfig(r=2, target_modules="all-linear"))  # on the router as well, which gives a tuple
    assert theirs.trained > 0
    assert theirs.flops is None


@pytest.mark.filterwarnings(
    "ignore:Unsupported layer type", "ignore:The following .*_pattern keys did not match"
)  # PEFT's own
def test_a_lora_of_peft_on_fused_experts_is_counted() -> None:  # peft#3009
    sizes = {
        "hidden_size": 16,
        "moe_intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    base = hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**sizes, num_key_value_heads=1, num_experts=4, vocab_size=40))
    spent = cost(base, LoraConfig(r=2, target_modules="all-linear"))
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    assert spent.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert spent.flops is None
    assert not any("experts" in note for note in spent.notes)


def test_a_router_that_is_a_linear_layer_is_named() -> None:
    """Llama 4's, which gives two tensors; with an adapter of PEFT's its forward fails in training as well."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "head_dim": 16, "num_local_experts": 2, "vocab_size": 40}
    base = hf.Llama4ForCausalLM(hf.Llama4TextConfig(**sizes, **more, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    with pytest.raises(ValueError, match=r"router: the adapter cannot run on this Llama4Router .*; leave it out of"):
        cost(base, LoraConfig(target_modules=["q_proj", "router"]))
    with pytest.raises(ValueError, match=r"router is a Llama4Router, and only linear layers .*; leave it out of"):
        cost(base, PlainLoraConfig(target_modules=["q_proj", "router"]))
    assert cost(base, LoraConfig(target_modules=["q_proj"])).flops is not None


def test_what_peft_cannot_save_is_said() -> None:
    """An adapter on the head of a speech model, which has no embedding; PEFT saves the two together."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = {"conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_conv_pos_embeddings": 16}
    base = hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**sizes, **small, num_conv_pos_embedding_groups=2, vocab_size=20))
    with pytest.raises(ValueError, match=r"^LoraConfig: PEFT cannot save it on this model: .*; leave lm_head out"):
        cost(base, LoraConfig(r=2, target_modules="all-linear"))
    assert cost(base, LoraConfig(r=2, target_modules=["q_proj"])).trained == 2 * 2 * 16


def test_a_gguf_file_by_its_header(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in {
        "block_count": 2,
        "context_length": 32,
        "embedding_length": 32,
        "feed_forward_length": 48,
    }.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_vocab_size(40)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = PlainLoraConfig(r=4, target_modules="all-linear")
    of_config = cost(meta_model(str(folder(tmp_path / "llama", "llama")), "causal-lm"), config)
    assert cost(meta_model(str(path), "causal-lm"), config).trained == of_config.trained


def test_bad_models(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "nothing-known"}')
    (tmp_path / "bad.gguf").write_bytes(b"GGUF?")
    for name in ("broken", "odd", "bad.gguf", "missing/model/x"):
        with pytest.raises(ModelError, match=r"^model") as error:
            meta_model(str(tmp_path / name))
        assert "\n" not in str(error.value)
    with pytest.raises(ModelError, match="no causal-lm model"):
        meta_model(str(folder(tmp_path / "t5", "t5")), "causal-lm")
    with pytest.raises(ValueError, match="task='sorting'"):
        meta_model(str(folder(tmp_path / "llama", "llama")), "sorting")
    with pytest.raises(ValueError, match="nowhere"):
        cost(meta_model(str(tmp_path / "llama")), RasaConfig(target_modules=["nowhere"]))
