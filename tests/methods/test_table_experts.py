"""Every method on fused experts: against the same model with W + ΔW, against stock PEFT, and what their names mean."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from moe_models import FAMILIES, IDS, build, out
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from table import FIRST, Row, assert_same, snapshot, stir
from torch import Tensor, nn
from torch.func import functional_call

from rankfold import CoraConfig, PlainLoraConfig, RasaConfig, attach
from rankfold.doctor import diagnose
from rankfold.errors import RankfoldError
from rankfold.fold import FoldedStateDict, fold_model, fold_state_dict
from rankfold.host import parameter_layer, registry
from rankfold.host.config import LowRankConfig
from rankfold.host.parameter_layer import AdaptedParameters
from rankfold.plan.cost import cost

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
OTHERS = [row for row in FIRST if row.facts.method != "cora"]
methods = pytest.mark.parametrize("row", OTHERS, ids=str)


def adapt(family: str, config: LowRankConfig, live: bool = True) -> PeftModel:
    model = get_peft_model(build(family), config)  # pyright: ignore[reportArgumentType]
    if live:
        stir(model)
    return model.eval()  # pyright: ignore[reportReturnType]


def lora(**fields: Any) -> PlainLoraConfig:
    return PlainLoraConfig(**{"r": 4, "target_modules": ["o_proj"], "target_parameters": BOTH, **fields})


def configured(row: Row, **fields: Any) -> LowRankConfig:
    given = {"target_modules": ["o_proj"], "target_parameters": BOTH, **row.kwargs, **fields}
    return registry.get(row.facts.method).config(**given)


def experts(model: nn.Module) -> dict[str, AdaptedParameters]:
    return {
        n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, AdaptedParameters)
    }


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def check(model: PeftModel, family: str, folder: Path) -> None:
    """Merged, unmerged, saved, loaded, folded: always the same function."""
    wanted, before = out(model), snapshot(model)
    assert not torch.allclose(wanted, out(build(family)), atol=1e-2)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(out(model), wanted, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert_same(snapshot(model), before)
    model.peft_config["default"].allow_unscheduled = True  # pyright: ignore[reportAttributeAccessIssue]
    model.save_pretrained(folder / "own")
    assert torch.equal(out(PeftModel.from_pretrained(build(family), folder / "own").eval()), wanted)  # pyright: ignore
    report = fold_model(model, folder / "folded")
    assert report.worst.frobenius < 1e-6
    stock = PeftModel.from_pretrained(build(family), folder / "folded").eval()  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(out(stock), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out(model.merge_and_unload()), wanted, rtol=1e-4, atol=1e-5)  # pyright: ignore


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    torch.testing.assert_close(out(adapt(family, lora(), live=False)), out(build(family)), rtol=1e-5, atol=1e-5)
    check(adapt(family, lora()), family, tmp_path)


@methods
def test_every_method(row: Row, tmp_path: Path) -> None:
    if row.facts.starts_at_base:
        torch.testing.assert_close(out(adapt("qwen3_moe", configured(row), live=False)), out(build("qwen3_moe")))
    check(adapt("qwen3_moe", configured(row)), "qwen3_moe", tmp_path)


@methods
def test_scale(row: Row) -> None:
    """scale_layer multiplies every expert's update once, however many there are: unmerged, as a delta, merged, and folded."""
    model = adapt("qwen3_moe", configured(row, target_modules=[]))
    named = {(n, p): m for n, m in experts(model).items() for p in m.adapted_parameters(["default"])}
    whole = {key: layer.get_delta_weight("default", key[1]) for key, layer in named.items()}
    for layer in experts(model).values():
        layer.scale_layer(0.5)
        layer.scale_layer(0.5)
    for key, layer in named.items():
        torch.testing.assert_close(layer.get_delta_weight("default", key[1]), 0.25 * whole[key])
    wanted = out(model)
    stock = get_peft_model(build("qwen3_moe"), LoraConfig(**_fields(lora_state := fold_state_dict(model))))
    set_peft_model_state_dict(stock, dict(lora_state))
    torch.testing.assert_close(out(stock.eval()), wanted, rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(out(model), wanted, rtol=1e-4, atol=1e-5)


def _fields(lora: FoldedStateDict) -> dict[str, Any]:
    return {k: v for k, v in lora.config.items() if k not in ("peft_type", "base_model_name_or_path")}


@methods
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_gradients_are_those_of_the_changed_weights(row: Row, family: str) -> None:
    model, base = adapt(family, configured(row, target_modules=[])).double(), build(family).double()
    base.config._experts_implementation = "eager"  # pyright: ignore  (the grouped one lacks float64)
    (layer, *_) = experts(model).values()
    assert {a.site.in_features for a in layer.adapters(["default"])} == {16, 12}

    def changed() -> dict[str, Tensor]:
        found = {}
        for name, one in experts(model).items():
            for parameter, stacks in one.lowrank_adapters["default"].items():  # pyright: ignore
                delta = torch.stack([torch.stack([b.delta() for b in a.blocks()]).sum(0) for a in stacks])
                delta = delta.transpose(1, 2) if family == "gpt_oss" else delta  # the one that stores in × out
                found[f"{name}.{parameter}"] = base.get_parameter(f"{name}.{parameter}") + delta
        return found

    wanted = functional_call(base, changed(), (IDS,)).logits
    torch.testing.assert_close(model(IDS).logits, wanted)
    own = [p for p in model.parameters() if p.requires_grad]
    weights = torch.randn(wanted.shape, dtype=torch.float64)
    ours = torch.autograd.grad((model(IDS).logits * weights).sum(), own, allow_unused=True)
    theirs = torch.autograd.grad((wanted * weights).sum(), own)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)


# What names mean ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:The following .*_pattern keys")  # PEFT's own
@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("mixtral", ["w1", "w2", "w3"]),
        ("mixtral", ["q_proj", "w2", "gate"]),
        ("qwen3_moe", ["gate_proj", "up_proj", "down_proj", "v_proj"]),
        ("olmoe", r".*\.(gate|up|down)_proj"),
        ("deepseek_v3", ["gate_proj", "up_proj", "down_proj"]),
    ],
)
def test_names_of_experts_mean_what_they_mean_to_peft(family: str, names: Any) -> None:
    theirs = get_peft_model(build(family), LoraConfig(r=3, target_modules=names))  # pyright: ignore[reportArgumentType]
    ours = adapt(family, PlainLoraConfig(r=3, target_modules=names))
    assert trained(ours) == trained(theirs)
    for field in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern"):
        a, b = (getattr(m.peft_config["default"], field) for m in (ours, theirs))
        assert (sorted(a or []), a) if isinstance(a, dict) else sorted(a or []) == sorted(b or []), field


def test_all_linear_reaches_experts_and_leaves_routers_alone() -> None:
    model = adapt("qwen3_moe", PlainLoraConfig(r=2, target_modules="all-linear"))
    config: Any = model.peft_config["default"]
    assert config.target_parameters == ["down_proj", "gate_up_proj"]
    assert len(experts(model)) == 2
    with pytest.warns(UserWarning, match="'all-linear': no adapter on: fused experts, .* of the parameters"):
        adapt("granitemoe", PlainLoraConfig(r=2, target_modules="all-linear"))  # PEFT converts no names of its


def test_all_linear_leaves_routers_alone_that_are_linear_layers_by_their_class() -> None:
    """Llama 4's gives two tensors, so no update can be added to what it gives."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "head_dim": 16, "num_local_experts": 2, "vocab_size": 40, "pad_token_id": 0}
    base = hf.Llama4ForCausalLM(hf.Llama4TextConfig(**sizes, **more, bos_token_id=1, eos_token_id=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what it does not reach
        model = get_peft_model(base, PlainLoraConfig(r=2, target_modules="all-linear"))
    targets = model.peft_config["default"].target_modules or ()
    assert not any("router" in name for name in targets)
    assert any("q_proj" in name for name in targets)
    assert torch.isfinite(model(input_ids=torch.arange(6)[None]).logits).all()


def test_half_of_a_fused_parameter_is_refused() -> None:
    with pytest.raises(RankfoldError, match="w1 without also targeting w3"):
        adapt("mixtral", PlainLoraConfig(target_modules=["w1", "w2"]))


def test_a_named_router_is_adapted(tmp_path: Path) -> None:
    model = adapt("mixtral", lora(target_parameters=["gate.weight", "experts.down_proj"]))
    assert [list(one.adapted_parameters(["default"])) for one in experts(model).values()] == [
        ["weight"],
        ["down_proj"],
    ] * 2
    check(model, "mixtral", tmp_path)


def test_ranks_by_expert_and_by_parameter(tmp_path: Path) -> None:
    patterns = {
        "rank_pattern": {r"experts\.[02]\.down_proj": 2, "experts.gate_up_proj": 6},
        "alpha_pattern": {r"3\.down_proj": 3},
    }
    model = adapt("qwen3_moe", lora(**patterns))
    (layer, _) = experts(model).values()
    ranks = [(a.r, a.lora_alpha) for a in layer.adapters(["default"])]
    assert ranks == [(6, 8)] * 4 + [(2, 8), (4, 8), (2, 8), (4, 3)]
    check(model, "qwen3_moe", tmp_path)


def test_experts_of_one_layer_pool() -> None:
    model = adapt("qwen3_moe", RasaConfig(r=4, shared_rank=1, target_modules=[], target_parameters=BOTH))
    pools: Any = model.base_model.model.lowrank_shared["default"]
    assert sorted(pools) == [f"{i}-mlp-experts-{p}" for i in (0, 1) for p in ("down_proj-16x12", "gate_up_proj-24x16")]
    assert {pool.down.shape[0] for pool in pools.values()} == {4}
    assert {a.factors().rank for layer in experts(model).values() for a in layer.adapters(["default"])} == {3 + 4}


def test_names_that_match_nothing_are_named() -> None:
    with pytest.warns(
        UserWarning,
        match="target_parameters: 'experts.w9' has no effect: no parameter of the model is called 'experts.w9'",
    ):
        adapt("mixtral", lora(target_parameters=["experts.down_proj", "experts.w9"]))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (
            {"target_parameters": ["q_proj.weight"]},
            r"layers\.0\.self_attn\.q_proj\.weight is of a Linear; name .* in target_modules",
        ),
        ({"target_parameters": ["post_attention_layernorm.weight"]}, "has 1 dimensions"),
        ({"target_parameters": ["norms"], "target_modules": []}, "no `target_parameters` found"),
    ],
)
def test_what_cannot_be_adapted_is_refused_before_anything_is_touched(fields: dict[str, Any], named: str) -> None:
    model = build("mixtral")
    before = snapshot(model)
    config = lora(**fields)
    with pytest.raises(ValueError, match=named):
        get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    assert_same(snapshot(model), before)


def test_what_experts_cannot_do_is_said(tmp_path: Path) -> None:
    with pytest.raises(RankfoldError, match="cora adapts linear layers alone"):
        adapt("mixtral", CoraConfig.planned(target_modules=[], target_parameters=BOTH))
    with pytest.raises(RankfoldError, match="cannot be mixed in a batch"):
        adapt("mixtral", lora()).eval()(IDS, adapter_names=["default", "__base__"])
    with pytest.raises(RankfoldError, match="lora_dropout: MixtralTopKRouter runs its own forward"):
        adapt("mixtral", lora(target_parameters=["gate.weight"], lora_dropout=0.1)).train()(IDS)
    model = adapt("mixtral", lora())
    for profile in ("compact", "gguf", "merged"):
        with pytest.raises(RankfoldError, match="fold with profile uniform"):
            fold_model(model, tmp_path, profile=profile)
    with pytest.raises(RankfoldError, match="target_parameters has no sum on a live model"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


# What it costs and how it trains ------------------------------------------------------------------------------------


def test_unused_experts_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = parameter_layer.low_rank_linear
    monkeypatch.setattr(parameter_layer, "low_rank_linear", lambda x, *more: calls.append(len(x)) or real(x, *more))
    model = adapt("qwen3_moe", lora())
    out(model, IDS[:1, :1])
    assert calls == [1] * 8  # two layers, two experts of one token, two parameters
    calls.clear()
    (layer, _) = experts(model).values()
    none = torch.empty(0, 2)
    assert layer(torch.empty(0, 16), none.long(), none).shape == (0, 16)
    assert not calls


def test_switching_disabling_and_deleting() -> None:
    model = adapt("mixtral", lora())
    first = out(model)
    model.add_adapter("other", lora(r=2, target_modules=["v_proj"], target_parameters=["experts.down_proj"]))
    stir(model, "other", seed=5)
    model.set_adapter("other")
    assert not torch.allclose(out(model), first)
    model.set_adapter("default")
    assert torch.equal(out(model), first)
    with model.disable_adapter():
        torch.testing.assert_close(out(model), out(build("mixtral")))
    model.delete_adapter("other")
    assert torch.equal(out(model), first)
    assert torch.equal(out(copy.deepcopy(model)), first)


@pytest.mark.parametrize("row", [row for row in OTHERS if row.facts.method in ("sora", "adalora")], ids=str)
def test_a_schedule_trains_experts_that_no_token_visits(row: Row) -> None:
    changes = {"target_r": 2} if "target_r" in row.kwargs else {"threshold": 0.05}
    model = adapt("qwen3_moe", configured(row, **changes), live=False).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    attached = attach(model, optimizer, total_steps=4)
    for _ in range(4):
        optimizer.zero_grad()
        model(IDS[:1, :2], labels=IDS[:1, :2]).loss.backward()
        optimizer.step()
    attached.remove()
    alive = [a.alive() for layer in experts(model).values() for a in layer.adapters(["default"])]
    assert len(alive) == 16
    if "target_r" in changes:
        assert sum(alive) <= 2 * (16 + 2)


def test_resumed_is_bit_identical(tmp_path: Path) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model.train()(IDS[:, step : step + 6], labels=IDS[:, step : step + 6]).loss.backward()
            optimizer.step()

    config = RasaConfig(r=4, target_modules=["v_proj"], target_parameters=BOTH)
    torch.manual_seed(3)
    model = adapt("qwen3_moe", config, live=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    run(model, optimizer, range(2))
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    run(model, optimizer, range(2, 4))
    again: Any = PeftModel.from_pretrained(build("qwen3_moe"), tmp_path, is_trainable=True)  # pyright: ignore
    resumed = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad])
    resumed.load_state_dict(state)
    run(again, resumed, range(2, 4))
    assert torch.equal(out(again.eval()), out(model.eval()))


def test_checkpointed_and_compiled_are_the_same_function() -> None:
    model = adapt("qwen3_moe", lora())
    wanted = out(model)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable()
        model.train().zero_grad()
        model(IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][name], rtol=0, atol=0)
    torch._dynamo.reset()
    (layer, _) = experts(model.eval()).values()
    x, index, share = torch.randn(6, 16), torch.tensor([[0, 2]] * 6), torch.full((6, 2), 0.5)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, index, share), layer(x, index, share), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out(model), wanted)


@methods
def test_counts_of_a_plan(row: Row) -> None:
    spent = cost(build("qwen3_moe"), configured(row))
    assert spent.trained == trained(adapt("qwen3_moe", configured(row)))
    assert spent.flops is not None
    if row.facts.method in ("lora", "rasa", "sora"):
        assert spent.folded_rank == row.facts.rank(configured(row), configured(row).r, 4)


def test_the_files_of_a_fold_are_pefts(tmp_path: Path) -> None:
    fold_model(adapt("qwen3_moe", lora(r=8)), tmp_path)
    shapes = {
        k: tuple(v.shape) for k, v in load_file(tmp_path / "adapter_model.safetensors").items() if "layers.1.mlp" in k
    }
    prefix = "base_model.model.model.layers.1.mlp.experts"
    assert shapes == {
        f"{prefix}.base_layer.lora_A.weight": (32, 16),
        f"{prefix}.base_layer.lora_B.weight": (24, 32),
        f"{prefix}.lora_A.weight": (32, 12),
        f"{prefix}.lora_B.weight": (16, 32),
    }


@pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:The following .*_pattern keys")  # PEFT's own
@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_one_lora_per_expert_under_their_old_names(family: str, tmp_path: Path) -> None:
    """What vLLM reads for classes without three-dimensional experts, and PEFT through its own conversion."""
    model = adapt(family, RasaConfig(r=4, target_modules=["o_proj"], target_parameters=BOTH))
    report = fold_model(model, tmp_path, profile="per_expert")
    assert report.worst.frobenius < 1e-6
    assert list(report.serve) == ["vLLM", "PEFT"]
    names = {
        key.rpartition("experts.")[2]
        for key in load_file(tmp_path / "adapter_model.safetensors")
        if "layers.1." in key and "experts" in key
    }
    projections = ("w1", "w2", "w3") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    assert names == {f"{e}.{p}.lora_{side}.weight" for e in range(4) for p in projections for side in "AB"}
    stock = PeftModel.from_pretrained(build(family), tmp_path).eval()  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(out(stock), out(model), rtol=1e-4, atol=1e-5)


def test_doctor_reads_both_folds(tmp_path: Path) -> None:
    build("olmoe").save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    model = adapt("olmoe", lora(target_modules=["q_proj", "k_proj", "v_proj"]))
    for profile in ("uniform", "per_expert"):
        fold_model(model, tmp_path / profile, profile=profile)
        found = diagnose(str(tmp_path / profile), str(tmp_path / "base"), ["vllm", "peft"])
        assert not found.problems, profile
        assert found.healthy == (profile == "per_expert")  # vLLM takes fused ones for some classes only


def test_per_expert_needs_all_of_them_and_their_names(tmp_path: Path) -> None:
    with pytest.raises(
        RankfoldError, match=r"names that the experts of .*gate_up_proj|down_proj had as modules are not known"
    ):
        fold_model(adapt("gpt_oss", lora()), tmp_path, profile="per_expert")
    with pytest.raises(RankfoldError, match=r"gate_up_proj has no adapter"):
        fold_model(adapt("olmoe", lora(target_parameters=["experts.down_proj"])), tmp_path, profile="per_expert")


def test_a_fold_in_memory_is_that_on_disk(tmp_path: Path) -> None:
    model = adapt("qwen3_moe", lora(r=8))
    fold_model(model, tmp_path)
    stored, held = load_file(tmp_path / "adapter_model.safetensors"), fold_state_dict(model)
    assert stored.keys() == held.keys()
    layout = [{k: v.shape for k, v in one.items()} for one in (stored, held)]
    assert layout[0] == layout[1]
    a, b = (k for k in stored if "layers.0.mlp.experts.lora_" in k)
    for one in (stored, held):  # the same update, whichever factor has the scale
        down, up = one[a].view(4, 8, 12), one[b].view(16, 8, 4)
        torch.testing.assert_close(
            torch.einsum("ore,eri->eoi", up, down),
            experts(model)["model.layers.0.mlp.experts"].get_delta_weight("default", "down_proj"),
        )
