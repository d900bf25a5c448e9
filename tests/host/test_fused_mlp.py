"""A gated MLP whose three layers are adapted is one node of autograd: the same numbers, fewer bytes, and no trace of it elsewhere."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertModel,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rankfold import Factors, PlainLoraConfig, RasaConfig
from rankfold.host.fused_mlp import ACTIVATIONS, FusedMlp, _is_gated_mlp
from rankfold.host.linear_layer import AdaptedLinear
from rankfold.kernel.gated_mlp import Activation, gated_mlp
from rankfold.kernel.layout import Member, Term
from rankfold.kernel.linears import separate_order

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.arange(14).view(2, 7) % 32
SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, mlp_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gemma (GeGLU)": lambda: GemmaForCausalLM(GemmaConfig(**SIZES)),
}


def adapted(name: str = "llama", config: type = PlainLoraConfig, **fields: Any) -> Any:
    torch.manual_seed(0)
    defaults = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    return get_peft_model(MODELS[name](), config(**{**defaults, **fields})).train()


def fused(model: nn.Module) -> list[FusedMlp]:
    return [m for m in model.modules() if isinstance(m, FusedMlp)]


def step(model: Any, seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    logits = model(input_ids=IDS).logits
    logits.float().square().mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One more entry for each call of the fused computation."""
    calls: list[int] = []

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return gated_mlp(*args)

    monkeypatch.setattr("rankfold.host.fused_mlp.gated_mlp", counted)
    return calls


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fields", [{}, {"lora_dropout": 0.1}, {"lora_dropout": 0.4}, {"r": 1}])
def test_the_same_numbers_as_separate_layers(name: str, fields: dict, monkeypatch: pytest.MonkeyPatch):
    calls = used(monkeypatch)
    model = adapted(name, **fields)
    assert len(fused(model)) == 2
    found, expected = step(model), step(adapted(name, **fields, fuse_mlp=False))
    assert len(calls) == 2
    assert found.keys() == expected.keys()
    assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype):
    found, expected = (step(adapted(config=RasaConfig, fuse_mlp=f).to(dtype)) for f in (True, False))
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {}
    assert_close(found, expected, **tolerance)


def test_autocast():
    def run(fuse: bool) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return step(adapted(lora_dropout=0.1, fuse_mlp=fuse))

    assert_close(run(True), run(False), atol=1e-2, rtol=2e-2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool):
    model, plain = adapted(lora_dropout=0.1), adapted(lora_dropout=0.1)
    model.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers has another name for it
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_close(step(model), step(plain))


@pytest.mark.slow
def test_compiled():
    torch.compiler.reset()
    model = adapted()
    expected = step(model)
    model.base_model.model.model.forward = torch.compile(model.base_model.model.model.forward, fullgraph=True)
    assert_close(step(model), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("act", set(ACTIVATIONS.values()))
def test_gradcheck(act: Activation, p: float):
    torch.manual_seed(0)
    new = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    tensors = [new(4, 3), *(t for out, into in ((5, 3), (5, 3), (3, 5)) for t in (new(2, into), new(out, 2), new(2)))]
    weights = [torch.randn(*shape, dtype=torch.float64) for shape in ((5, 3), (5, 3), (3, 5))]

    def run(x: Tensor, *factors: Tensor) -> Tensor:
        torch.manual_seed(1)
        terms = [[Term([Factors(*factors[3 * i : 3 * i + 3], scale=0.7)], p)] for i in range(3)]
        members = [Member(w, torch.ones(len(w), dtype=torch.float64), t) for w, t in zip(weights, terms, strict=True)]
        return gated_mlp(x, *members, act)

    assert torch.autograd.gradcheck(run, tuple(tensors))


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(kept.values())


def test_it_keeps_less_than_the_frozen_base_does():
    x = torch.randn(64, 16, requires_grad=True)
    base = MODELS["llama"]().requires_grad_(False).model.layers[0].mlp
    mlp = fused(adapted(r=2))[0]
    frozen, ours = saved_bytes(base, x), saved_bytes(mlp, x)
    assert frozen == 4 * 64 * 3 * 24
    assert ours == 4 * 64 * (16 + 2 * 24 + 3 * 2)  # x, gate's and up's outputs, h of the three
    assert ours < frozen


def test_only_what_is_literally_a_gated_mlp():
    class Other(nn.Module):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    class Renamed(nn.Module):
        def forward(self, hidden):
            return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))

    assert _is_gated_mlp(Renamed)
    assert not _is_gated_mlp(Other)
    assert not _is_gated_mlp(nn.Linear)
    assert not _is_gated_mlp(type(BertModel(BertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=8))))
    assert not fused(adapted(target_modules=["gate_proj", "up_proj"]))


def test_what_computes_its_own_output_is_left_to_itself(monkeypatch: pytest.MonkeyPatch):
    calls = used(monkeypatch)
    model = adapted()
    expected = step(model)
    calls.clear()
    mlp = fused(model)[0]
    seen: list[int] = []
    handles = [
        mlp.act_fn.register_forward_hook(lambda *_: seen.append(0)),
        fused(model)[1].down_proj.register_forward_pre_hook(lambda *_: seen.append(1)),
    ]
    assert_close(step(model), expected)
    assert seen == [0, 1]
    assert not calls
    for handle in handles:
        handle.remove()
    with separate_order():
        assert_close(step(model), expected, atol=1e-6, rtol=1e-5)
    model.base_model.model.model.layers[0].mlp.act_fn = nn.Tanh()  # not one of ours
    step(model)
    assert len(calls) == 1


def test_merged_disabled_switched_and_deleted():
    model = adapted()
    model.add_adapter("b", PlainLoraConfig(r=2, target_modules=["gate_proj"], init_lora_weights=False))
    reference = adapted(fuse_mlp=False)
    reference.add_adapter(
        "b", PlainLoraConfig(r=2, target_modules=["gate_proj"], init_lora_weights=False, fuse_mlp=False)
    )
    reference.load_state_dict(model.state_dict())
    assert not fused(reference)
    for act in (
        lambda m: m.set_adapter("b"),
        lambda m: m.base_model.set_adapter(["default", "b"]),
        lambda m: m.disable_adapter_layers(),
        lambda m: m.enable_adapter_layers(),
        lambda m: m.merge_adapter(["default"]),
        lambda m: m.unmerge_adapter(),
        lambda m: m.delete_adapter("b"),
    ):
        for m in (model, reference):
            act(m)
        assert_close(model(input_ids=IDS).logits, reference(input_ids=IDS).logits)


def test_copies_and_pickles_are_whole_and_unloading_leaves_no_trace():
    model = adapted()
    expected = step(model)
    assert_close(step(copy.deepcopy(model)), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert len(fused(again)) == 2
    assert_close(step(again), expected)
    bare = model.unload()
    assert not fused(bare)
    assert type(bare.model.layers[0].mlp).__name__ == "LlamaMLP"
    assert not any(isinstance(m, AdaptedLinear) for m in bare.modules())


def test_a_layer_that_is_not_alike_is_computed_apart(monkeypatch: pytest.MonkeyPatch):
    calls = used(monkeypatch)
    model, reference = adapted(lora_dropout=0.3, share_dropout=False), adapted(lora_dropout=0.3, fuse_mlp=False)
    step(model)
    assert not calls  # each layer has a mask of its own
    assert_close(model.eval()(input_ids=IDS).logits, reference.eval()(input_ids=IDS).logits)
    assert len(calls) == 2  # without dropout there is nothing to be apart for


def test_offloaded_weights_are_fetched_first():
    """accelerate gives an offloaded layer a forward of its own, before which its weight is on the meta device."""
    model = adapted().eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        cpu_offload(model, torch.device("cpu"))
        assert next(layer for layer in model.modules() if isinstance(layer, AdaptedLinear)).base_layer.weight.is_meta
        assert_close(model(input_ids=IDS).logits, expected)
