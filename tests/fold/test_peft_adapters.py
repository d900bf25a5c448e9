"""PEFT's own adapters: one table of configs, each folded and compared with PEFT's model and with its merged weights."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

from rankfold.fold import fold_adapter, fold_model, read_source
from rankfold.fold.peft_adapters import from_model
from rankfold.fold.peft_updates import REFUSED, UPDATES, kind
from rankfold.io.adapters import read_config
from rankfold.kernel.factors import Factors

TOKENS = torch.arange(5, 21)[None]
HIDDEN, MLP = 32, 48
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Row:
    """One config.

    Args:
        name: of the config's class in peft.
        options: of the config; init is random.
        rank: the folded rank that the algebra says for q_proj, or None for an update without factors.
        base: "llama" or "gpt2".
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    rank: int | None = None
    base: str = "llama"

    def config(self) -> PeftConfig:
        targets = ALL if self.base == "llama" else ["c_attn", "mlp.c_proj"]
        options = {"target_modules": targets, "task_type": "CAUSAL_LM", **self.options}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(peft, self.name)(**options)


CONV = {"fan_in_fan_out": True}
PATTERNS = {"rank_pattern": {"q_proj": 7, r".*1\.mlp\.down_proj": 9}, "alpha_pattern": {"k_proj": 3}}
ADA = {"init_r": 6, "target_r": 4, "total_step": 10, "tinit": 1, "tfinal": 1, "init_lora_weights": False}
ROWS = {
    "lora": Row("LoraConfig", {"r": 4, "lora_alpha": 6}, 4),
    "lora, patterns and rsLoRA": Row("LoraConfig", {"r": 4, "use_rslora": True, **PATTERNS}, 7),
    "lora, some layers": Row("LoraConfig", {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]}, 4),
    "lora, orthogonal": Row("LoraConfig", {"r": 4, "init_lora_weights": "orthogonal"}, 4),
    "lora, gpt2": Row("LoraConfig", {"r": 4, **CONV}, 4, "gpt2"),
    "pissa": Row("LoraConfig", {"r": 4, "lora_alpha": 6, "init_lora_weights": "pissa"}, 8),
    "pissa, gpt2": Row("LoraConfig", {"r": 4, "init_lora_weights": "pissa", **CONV}, 8, "gpt2"),
    "olora": Row("LoraConfig", {"r": 4, "lora_alpha": 6, "init_lora_weights": "olora"}, 8),
    "dora": Row("LoraConfig", {"r": 4, "use_dora": True}),
    "dora, gpt2": Row("LoraConfig", {"r": 4, "use_dora": True, **CONV}, None, "gpt2"),
    "adalora": Row("AdaLoraConfig", ADA, 6),
    "adalora, gpt2": Row("AdaLoraConfig", {**ADA, **CONV}, 6, "gpt2"),
    "loha": Row("LoHaConfig", {"r": 3, "alpha": 6}, 9),
    "loha, r² beyond the weight": Row("LoHaConfig", {"r": 6, "alpha": 3}, HIDDEN),
    "lokr": Row("LoKrConfig", {"r": 2, "alpha": 5, "decompose_factor": 4}, 8),
    "lokr, both": Row("LoKrConfig", {"r": 1, "alpha": 5, "decompose_factor": 4, "decompose_both": True}, 1),
    "lokr, whole": Row("LoKrConfig", {"r": 64, "alpha": 5, "decompose_factor": 4}, HIDDEN),
    "vera": Row("VeraConfig", {"r": 5}, 5),
    "vera, not saved": Row("VeraConfig", {"r": 5, "save_projection": False}, 5),
    "vera, gpt2": Row("VeraConfig", {"r": 5, **CONV}, 5, "gpt2"),
    "vblora": Row("VBLoRAConfig", {"r": 3, "num_vectors": 12, "vector_length": 8}, 3),
    "vblora, top k only": Row(
        "VBLoRAConfig", {"r": 3, "num_vectors": 12, "vector_length": 8, "save_only_topk_weights": True}, 3
    ),
    "vblora, gpt2": Row("VBLoRAConfig", {"r": 3, "num_vectors": 12, "vector_length": 8, **CONV}, 3, "gpt2"),
    "unilora": Row("UniLoraConfig", {"r": 3}, 3),
    "miss": Row("MissConfig", {"r": 4}, 4),
    "miss, remainder": Row("MissConfig", {"r": 5}, 5),
    "miss, mini": Row("MissConfig", {"r": 4, "mini_r": 2, "init_weights": "mini"}, 4),
    "miss, bat": Row("MissConfig", {"r": 4, "init_weights": "bat"}),
    "hra": Row("HRAConfig", {"r": 4, "init_weights": False}, 4),
    "hra, GS": Row("HRAConfig", {"r": 4, "apply_GS": True, "init_weights": False}, 4),
    "delora": Row("DeloraConfig", {"r": 4}, 4),
    "randlora": Row("RandLoraConfig", {"r": 4}),
    "randlora, gpt2": Row("RandLoraConfig", {"r": 4, "randlora_alpha": 64, **CONV}, None, "gpt2"),
    "fourierft": Row("FourierFTConfig", {"n_frequency": 40, "scaling": 20}),
    "fourierft, gpt2": Row("FourierFTConfig", {"n_frequency": 40, "scaling": 20, **CONV}, None, "gpt2"),
    "waveft": Row("WaveFTConfig", {"n_frequency": 40}),
    "waveft, gpt2": Row("WaveFTConfig", {"n_frequency": 40, **CONV}, None, "gpt2"),
    "oft": Row("OFTConfig", {"oft_block_size": 8}),
    "oft, cayley": Row("OFTConfig", {"oft_block_size": 8, "use_cayley_neumann": False}),
    "boft": Row("BOFTConfig", {"boft_block_size": 4}),
    "c3a": Row("C3AConfig", {"block_size": 8}),
    "shira": Row("ShiraConfig", {"r": 2}),
    "hira": Row("HiraConfig", {"r": 4}),
    "hira, gpt2": Row("HiraConfig", {"r": 4, **CONV}, None, "gpt2"),
    "gralora": Row("GraloraConfig", {"r": 4, "gralora_k": 2}),
    "gralora, gpt2": Row("GraloraConfig", {"r": 4, "gralora_k": 2, **CONV}, None, "gpt2"),
    "road": Row("RoadConfig", {"group_size": 8}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bases")
    llama = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(llama).save_pretrained(folder / "llama")
    LlamaForCausalLM(llama).to(torch.bfloat16).save_pretrained(folder / "bfloat16")
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, initializer_range=0.2))
    gpt2.save_pretrained(folder / "gpt2", max_shard_size="40KB")  # an index and shards
    return {p.name: p for p in folder.iterdir()}


def shaken(config: PeftConfig, base: Path, **kwargs: Any) -> PeftModel:
    """The adapter with random weights on its base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, **kwargs), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                scale = 0.3 * float(p.std()) if p.numel() > 1 and p.std() > 0 else 0.1
                p.add_(torch.randn(p.shape, generator=generator).to(p.dtype), alpha=scale)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.float()


def folded(base: Path, out: Path) -> Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).eval())


def reloaded(base: Path, adapter: Path) -> PeftModel:
    """As stock PEFT loads it: what a user serves, and for PiSSA the start over again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def merged_updates(base: Path, adapter: Path) -> dict[str, Tensor]:
    """W' − W of every module, out × in, by merging the whole model in float64."""
    before = dict(AutoModelForCausalLM.from_pretrained(base).double().named_modules())
    model = reloaded(base, adapter).double()
    found = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "base_layer"):
            module.merge()
            delta = module.get_base_layer().weight.detach() - before[name].weight
            found[name] = delta.T if isinstance(before[name], Conv1D) else delta
    return found


def dense(update: Factors | Tensor) -> Tensor:
    return update.delta() if isinstance(update, Factors) else update


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch's, in PEFT's SHiRA
@pytest.mark.parametrize("name", ROWS)
def test_a_fold_is_what_peft_computes(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    row = ROWS[name]
    base, adapter, out = bases[row.base], tmp_path / "adapter", tmp_path / "out"
    model = shaken(row.config(), base)
    model.save_pretrained(adapter)
    expected = logits(reloaded(base, adapter))
    torch.testing.assert_close(expected, logits(model), rtol=1e-4, atol=1e-4)
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    assert (expected - plain).abs().max() > 2e-3  # the adapter does something
    if row.rank is None:
        with pytest.raises(ValueError, match=r"--error 0\.01, or how large with --rank"):
            fold_adapter(adapter, out, probe=False)
        assert not out.exists()
    report = fold_adapter(adapter, out, error=None if row.rank else 1e-9)
    assert report.probe["max_logit_error"] < 1e-4, report.probe  # type: ignore[operator]
    torch.testing.assert_close(folded(base, out), expected, rtol=1e-4, atol=1e-4)
    assert report.worst.frobenius < 2e-6
    if row.rank:
        first = next(p for p in report.layers if "0" not in p.module or "q_proj" in p.module or "c_attn" in p.module)
        assert first.rank == row.rank
        assert report.worst_of("truncation") == 0
    else:
        assert report.worst_of("truncation") <= 1e-9

    source = read_source(adapter)
    for module, delta in merged_updates(base, adapter).items():
        error = (dense(source.update(module)) - delta).norm() / delta.norm()
        assert error < 2e-6, module  # PiSSA's, OLoRA's and FourierFT's own float32 in PEFT; else 1e-15
        if row.name in ("LoHaConfig", "LoKrConfig", "HRAConfig", "AdaLoraConfig", "MissConfig", "DeloraConfig"):
            assert error < 1e-12, module


@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "hra", "loha", "vblora", "boft", "pissa", "lora, gpt2"])
def test_a_live_model_folds_the_same(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    row = ROWS[name]
    model = shaken(row.config(), bases[row.base])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    error = None if row.rank else 1e-6
    fold_model(model, tmp_path / "out", error=error)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    torch.testing.assert_close(folded(bases[row.base], tmp_path / "out"), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["lora", "vera", "vera, not saved", "dora", "pissa"])
def test_a_half_precision_base(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Rounding to bfloat16 is the only loss, and the report says how much."""
    row = ROWS[name]
    shaken(row.config(), bases["bfloat16"]).save_pretrained(tmp_path / "adapter")
    report = fold_adapter(tmp_path / "adapter", tmp_path / "out", error=None if row.rank else 1e-6, probe=False)
    assert report.dtype == "bfloat16"
    assert report.worst_of("rounding") < 5e-3
    source = read_source(tmp_path / "adapter")
    model = reloaded(bases["bfloat16"], tmp_path / "adapter").get_base_model()
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        layer = model.get_submodule(module)
        alone = copy.deepcopy(layer).double()
        alone.merge()
        original = AutoModelForCausalLM.from_pretrained(bases["bfloat16"]).get_submodule(module).weight.double()
        delta = alone.get_base_layer().weight - original
        # PiSSA rounds the rest of the base to bfloat16, which no LoRA can hold
        tolerance = 0.02 if name == "pissa" else 1e-6
        assert (dense(source.update(module)) - delta).norm() / delta.norm() < tolerance
    assert any("rounded the rest of the base" in n for n in report.notes) == (name == "pissa")


def test_a_converted_pissa_is_relative_to_its_base(bases: dict[str, Path], tmp_path: Path) -> None:
    """What PEFT saves with path_initial_model_for_weight_conversion: rank 2r, and no start."""
    config = ROWS["pissa"].config()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(bases["llama"]), config)
        config.init_lora_weights = True
        model.save_pretrained(tmp_path / "start")
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.mul_(1.1)
        model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    report = fold_adapter(tmp_path / "adapter", tmp_path / "out", probe=False)
    assert report.needed_rank == 8
    torch.testing.assert_close(folded(bases["llama"], tmp_path / "out"), logits(model.eval()), rtol=1e-4, atol=1e-4)


def test_a_pruned_adalora(bases: dict[str, Path], tmp_path: Path) -> None:
    """After its schedule the file holds fewer triplets than the config's init_r."""
    row = ROWS["adalora"]
    model = shaken(row.config(), bases["llama"])
    model.train()
    tuner = model.base_model
    for step in range(1, 11):
        model(TOKENS, labels=TOKENS).loss.backward()
        tuner.update_and_allocate(step)
        model.zero_grad()
    model.eval().save_pretrained(tmp_path / "adapter")
    assert read_config(tmp_path / "adapter").rank_pattern
    report = fold_adapter(tmp_path / "adapter", tmp_path / "out")
    assert sum(p.rank for p in report.layers) == 4 * len(report.layers)
    assert report.probe["max_logit_error"] < 1e-4  # type: ignore[operator]
    expected = logits(reloaded(bases["llama"], tmp_path / "adapter"))
    torch.testing.assert_close(folded(bases["llama"], tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)


def test_a_classifier_keeps_its_head(bases: dict[str, Path], tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=ALL, task_type=TaskType.SEQ_CLS, init_lora_weights=False)
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(bases["llama"], num_labels=3, pad_token_id=0)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    fold_adapter(tmp_path / "adapter", tmp_path / "out", probe=False)
    again = AutoModelForSequenceClassification.from_pretrained(bases["llama"], num_labels=3, pad_token_id=0)
    loaded = PeftModel.from_pretrained(again, tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [LoraConfig(r=4, init_lora_weights=False), peft.RoadConfig(group_size=8)], ids=kind)
def test_a_head_that_is_a_target_too(config: PeftConfig, tmp_path: Path) -> None:
    """The head of RoBERTa holds a `dense`, as its layers do; PEFT trains it in full and does not adapt it."""
    torch.manual_seed(0)
    base = RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            num_labels=3,
        )
    )
    base.save_pretrained(tmp_path / "base")
    config.target_modules, config.task_type = ["query", "dense"], "SEQ_CLS"  # type: ignore[attr-defined]
    base.name_or_path = str(tmp_path / "base")
    get_peft_model(base, config).save_pretrained(tmp_path / "a")
    assert any("classifier.dense.weight" in key for key in load_file(tmp_path / "a" / "adapter_model.safetensors"))
    report = fold_adapter(tmp_path / "a", tmp_path / "out", error=0.0, dtype="float32")
    assert len(report.layers) == 4
    assert report.probe["max_logit_error"] < 1e-5, report.probe  # type: ignore[operator]


# What cannot be folded: refused by name, with what to do, and nothing is written --------------------------------------

LORA_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"bias": "lora_only"}, "bias='lora_only'"),
    "lora_bias": ({"lora_bias": True}, "lora_bias=True"),
    "replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication="),
    "alora": ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens="),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices="),
    "pissa, randomised": ({"init_lora_weights": "pissa_niter_2"}, "differs at every load"),
    "corda": ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "depends on gradients"),
    "loftq": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "quantised"),
}


@pytest.mark.parametrize("name", LORA_REFUSED)
def test_what_a_lora_cannot_hold(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    fields, message = LORA_REFUSED[name]
    plain = {k: v for k, v in fields.items() if k in ("target_modules", "bias", "lora_bias")}
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **plain})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(AutoModelForCausalLM.from_pretrained(bases["llama"]), config).save_pretrained(tmp_path / "a")
    edit(tmp_path / "a", **fields)
    with pytest.raises(ValueError, match=message):
        fold_adapter(tmp_path / "a", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def edit(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("name", REFUSED)
def test_other_types_are_refused_by_name(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    fields = {"peft_type": name, "task_type": "CAUSAL_LM", "base_model_name_or_path": str(bases["llama"])}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(fields))
    save_file({"base_model.model.any": torch.zeros(1)}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"peft_type={name} cannot be folded into a LoRA: .*(it|its) "):
        fold_adapter(tmp_path / "a", tmp_path / "out")


def test_every_type_of_peft_is_folded_or_refused() -> None:
    """A type that this version does not know is refused too; this list says which those are."""
    known = {t.value for t in peft.PeftType} & {kind(ROWS[n].config()) for n in ROWS}
    assert known == set(UPDATES)
    assert not set(UPDATES) & set(REFUSED)


@pytest.mark.parametrize("name", ["ia3"])
def test_a_live_model_of_a_refused_type(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="IA3"):
        from_model(shaken(config, bases["llama"]))


def test_a_merged_model_is_refused(bases: dict[str, Path]) -> None:
    model = shaken(ROWS["lora"].config(), bases["llama"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        from_model(model)


def test_a_base_that_another_adapter_changed(bases: dict[str, Path]) -> None:
    model = shaken(ROWS["pissa"].config(), bases["llama"])
    model.add_adapter("other", ROWS["dora"].config())
    with pytest.raises(ValueError, match="adapter 'default' took its start out of this model's base"):
        from_model(model, "other")


def test_an_adapter_that_is_not_there(bases: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="adapter_name='x'"):
        from_model(shaken(ROWS["lora"].config(), bases["llama"]), "x")


def test_road_with_a_bias_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=64,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias.normal_()
    road = peft.RoadConfig(target_modules=["q_proj"], group_size=8, init_weights=False)
    with pytest.raises(ValueError, match="bias too"):
        fold_model(get_peft_model(model, road), tmp_path / "out", rank=8)
    assert not (tmp_path / "out").exists()


# Damaged files ------------------------------------------------------------------------------------------------------


def rewritten(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return damage


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (rewritten(lambda t: {k: v for k, v in t.items() if k != KEY}), "lacks 1 of"),
    "missing layer": (rewritten(lambda t: {k: v for k, v in t.items() if ".1." not in k}), "lacks 14 of"),
    "foreign": (rewritten(lambda t: {**t, "other.weight": torch.ones(3)}), r"such as base_model\.model\.other\.weight"),
    "shape": (rewritten(lambda t: {**t, KEY: torch.ones(4, 31)}), r"is \(4, 31\), and on this base it would be \(4, 32\)"),
    "nan": (rewritten(lambda t: {**t, KEY: t[KEY] * float("nan")}), "NaN or infinity in base_model"),
    "truncated": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-50]) and None,
        "truncated",
    ),
    "rank": (lambda f: edit(f, r=5), "would be"),
    "base": (lambda f: edit(f, base_model_name_or_path="/nowhere", use_dora=True), "--base FOLDER"),
    "no base": (lambda f: edit(f, base_model_name_or_path=None, use_dora=True), "--base FOLDER"),
    "targets": (lambda f: edit(f, target_modules=["nothing"]), "nothing"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    damage, message = DAMAGES[name]
    config = LoraConfig(r=4, target_modules=ALL, task_type="CAUSAL_LM", init_lora_weights=False)
    shaken(config, bases["llama"]).save_pretrained(tmp_path / "adapter")
    damage(tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        fold_adapter(tmp_path / "adapter", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_another_base(bases: dict[str, Path], tmp_path: Path) -> None:
    other = LlamaConfig(hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    LlamaForCausalLM(other).save_pretrained(tmp_path / "other")
    shaken(ROWS["loha"].config(), bases["llama"]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="give the base it was trained on"):
        fold_adapter(tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "has no tensor 'model.layers.0.self_attn.q_proj.weight'"),
        ({"model.layers.0.self_attn.q_proj.weight": torch.ones(5, 5)}, r"weight is \(5, 5\), not \(32, 32\)"),
        ({"model.layers.0.self_attn.q_proj.weight": torch.ones(32, 32, dtype=torch.int8)}, "unquantised"),
        (None, "safetensors"),
    ],
)
def test_a_base_without_the_weights(weights, message: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Types that need W say which weight is wrong; those that do not never look."""
    for name in ("hra", "loha"):
        shaken(ROWS[name].config(), bases["llama"]).save_pretrained(tmp_path / name)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text((bases["llama"] / "config.json").read_text())
    if weights is not None:
        save_file({"x": torch.ones(1), **weights}, base / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        fold_adapter(tmp_path / "hra", tmp_path / "out", base=str(base), probe=False)
    fold_adapter(tmp_path / "loha", tmp_path / "out", base=str(base), probe=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [("r", "x"), ("lora_alpha", None), ("rank_pattern", [1]), ("target_modules", 5), ("modules_to_save", 3)],
)
def test_a_config_with_a_value_of_the_wrong_type(field: str, value, bases: dict[str, Path], tmp_path: Path) -> None:
    shaken(ROWS["lora"].config(), bases["llama"]).save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter", **{field: value})
    with pytest.raises(ValueError, match="PEFT cannot use a value in it"):
        fold_adapter(tmp_path / "adapter", tmp_path / "deep" / "er" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_base_without_its_modules(bases: dict[str, Path], tmp_path: Path) -> None:
    shaken(ROWS["lora"].config(), bases["llama"]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"gpt2.* has no module of its target_modules, such as 'down_proj'"):
        fold_adapter(tmp_path / "adapter", tmp_path / "out", base=str(bases["gpt2"]))


def test_a_base_that_moved(bases: dict[str, Path], tmp_path: Path) -> None:
    shaken(ROWS["dora"].config(), bases["llama"]).save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter", base_model_name_or_path="/gone/base")
    with pytest.raises(ValueError, match="base='/gone/base' does not exist"):
        fold_adapter(tmp_path / "adapter", tmp_path / "out")
