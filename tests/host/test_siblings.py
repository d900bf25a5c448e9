"""Layers that read one input are computed together: one mask, and nothing left over. That every method gives the same numbers
is in the table, methods/test_table_siblings.py."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from rankfold import Factors, PlainLoraConfig
from rankfold.host.fused_mlp import unfuse_mlps
from rankfold.host.linear_layer import AdaptedLinear
from rankfold.host.siblings import Siblings
from rankfold.kernel.layout import Member, Term
from rankfold.kernel.linears import low_rank_linear, low_rank_linears

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.arange(14).view(2, 7) % 32
Grads = dict[str, Tensor]


def llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 32}
    config = T5Config(**sizes, feed_forward_proj="gated-gelu", dropout_rate=0.0, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def adapted(make: Any = llama, config: type = PlainLoraConfig, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    defaults = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    return get_peft_model(make(), config(**{**defaults, **fields})).train()


def layers(model: nn.Module) -> list[AdaptedLinear]:
    return [m for m in model.modules() if isinstance(m, AdaptedLinear)]


def alone(model: nn.Module) -> nn.Module:
    for layer in layers(model):
        layer.siblings = None
    unfuse_mlps(model)
    return model


def step(model: nn.Module, seed: int = 1) -> tuple[Tensor, Grads]:
    torch.manual_seed(seed)
    model.zero_grad()
    labels = torch.tensor([0, 1]) if "Bert" in type(model.get_base_model()).__name__ else IDS  # type: ignore[operator]
    loss = model(input_ids=IDS, labels=labels).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(one: tuple[Tensor, Grads], two: tuple[Tensor, Grads], rtol: float = 1e-4) -> None:
    assert_close(one[0], two[0])
    assert one[1].keys() == two[1].keys()
    for name, grad in one[1].items():
        assert (grad - two[1][name]).norm() <= rtol * two[1][name].norm() + 1e-7, name


@contextmanager
def inside(layer: AdaptedLinear) -> Iterator[None]:
    """As if the layer's parent ran its forward."""
    assert layer.siblings is not None
    layer.siblings._begin(nn.Identity(), ())
    try:
        yield
    finally:
        layer.siblings._end(nn.Identity(), (), None)


def test_nothing_waits_after_a_pass():
    model = adapted(lora_dropout=0.1)
    step(model)
    assert not any(layer.siblings._waiting for layer in layers(model) if layer.siblings)
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)
    assert not any(layer.siblings._waiting for layer in layers(model) if layer.siblings)


def test_cross_attention_has_no_siblings():
    cross = [m for n, m in adapted(t5).named_modules() if "EncDecAttention" in n and isinstance(m, AdaptedLinear)]
    assert len(cross) == 2 * 4
    assert all(m.siblings is None for m in cross)


def test_a_layer_that_reads_something_else_computes_its_own():
    model = adapted().eval()
    q, k = layers(model)[0], layers(model)[1]
    x, other = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    expected = [alone(copy.deepcopy(model))(input_ids=IDS).logits, layers(alone(copy.deepcopy(model)))[1](other)]
    with inside(q):
        q(x)
        assert_close(k(other), expected[1])
        q(x)
        x.mul_(2)  # not what it was when q read it
        assert_close(k(x), layers(alone(copy.deepcopy(model)))[1](x))
    assert_close(model(input_ids=IDS).logits, expected[0])


def test_what_was_computed_without_gradients_is_not_used_with_them():
    model = adapted()
    q, k = layers(model)[0], layers(model)[1]
    x = torch.randn(2, 3, 16)
    with inside(q):
        with torch.no_grad():
            q(x)
        k(x).sum().backward()
    assert all(p.grad is not None for p in k.lowrank_adapters.parameters())


def test_what_was_computed_in_one_precision_is_not_used_in_another():
    model = adapted()
    q, k = layers(model)[0], layers(model)[1]
    x = torch.randn(2, 3, 16)
    expected = k(x)
    with inside(q):
        with torch.autocast("cpu", torch.bfloat16):
            q(x)
        assert_close(k(x), expected)


@torch.no_grad()
def _scale_up(layer: AdaptedLinear) -> None:
    layer.lowrank_adapters["default"].up.mul_(2)  # type: ignore[union-attr]


def _scale_data(layer: AdaptedLinear) -> None:
    layer.lowrank_adapters["default"].up.data.mul_(2)  # type: ignore[union-attr]  (moves no version counter)


@pytest.mark.parametrize(
    "change",
    [
        lambda m, k: m.set_adapter("b"),
        lambda m, k: m.disable_adapter_layers(),
        lambda m, k: m.merge_adapter(),
        lambda m, k: (m.set_adapter("b"), m.delete_adapter("default")),
        lambda m, k: m.load_state_dict({n: 2 * t for n, t in m.state_dict().items()}),
        lambda m, k: _scale_up(k),
        lambda m, k: _scale_data(k),
        lambda m, k: m.eval(),
    ],
    ids=["switched", "disabled", "merged", "deleted", "loaded", "edited", "edited data", "eval"],
)
def test_layers_asked_one_by_one_follow_every_change(change):
    """A caller of its own, outside the parent's forward: k's output is k's own, whatever changed since q's."""
    model = adapted(lora_dropout=0.5)
    model.add_adapter("b", PlainLoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    q, k = layers(model)[:2]
    x = torch.randn(2, 3, 16)
    q(x)
    change(model, k)
    torch.manual_seed(1)
    found = k(x)
    torch.manual_seed(1)
    assert_close(found, layers(alone(copy.deepcopy(model)))[1](x), rtol=0, atol=0)


def test_only_one_sibling_asked_keeps_nothing_of_the_others():
    q = layers(adapted())[0]
    q(torch.randn(2, 3, 16, requires_grad=True)).sum().backward()
    assert not q.siblings._waiting


def test_a_failed_forward_leaves_nothing_behind():
    model = adapted()
    attention = model.get_submodule("base_model.model.model.layers.0.self_attn")
    attention.o_proj = nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        model(input_ids=IDS)
    assert not attention.q_proj.siblings._waiting
    assert not attention.q_proj.siblings._inside


def test_unloading_leaves_no_hook():
    model = adapted()
    bare = model.unload()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bare.modules())
    model = adapted()
    mlp = model.get_submodule("base_model.model.model.layers.0.mlp")
    model.delete_adapter("default")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert type(mlp).__name__ == "LlamaMLP"


def test_merged_disabled_switched_and_deleted():
    model = adapted()
    model.add_adapter("b", PlainLoraConfig(r=2, target_modules=["q_proj", "gate_proj"], init_lora_weights=False))
    reference = alone(copy.deepcopy(model))
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


def test_copies_link_to_copies_and_a_model_is_freed():
    model = adapted()
    twin = copy.deepcopy(model)
    q, q_twin = layers(model)[0], layers(twin)[0]
    assert q_twin.siblings is not q.siblings
    assert q_twin.siblings._layers[0]() is q_twin
    assert_close(step(twin)[0], step(model)[0])
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(q)
        del q, model
        assert gone() is None
    finally:
        gc.enable()


# Dropout ----------------------------------------------------------------------------------------------------------------


def masks(model: nn.Module) -> list[Tensor]:
    """What each of q, k and v dropped of an input of ones."""
    found = []
    x = torch.ones(4, 64, 16)
    for layer in layers(model)[:3]:
        with torch.no_grad():
            adapter = layer.lowrank_adapters["default"]
            adapter.down.copy_(torch.eye(16)), adapter.up.zero_()  # type: ignore[union-attr]
            adapter.up[: min(adapter.up.shape), : min(adapter.up.shape)] = torch.eye(min(adapter.up.shape))  # type: ignore[index]
            layer.base_layer.weight.zero_()
        found.append(layer)
    with inside(found[0]):
        return [layer(x)[..., :8] != 0 for layer in found]


def test_siblings_drop_the_same_elements_unless_told_not_to():
    q, k, v = masks(adapted(r=16, lora_dropout=0.3))
    assert torch.equal(q, k)
    assert torch.equal(q, v)
    q, k, v = masks(adapted(r=16, lora_dropout=0.3, share_dropout=False))
    assert not torch.equal(q, k)
    assert not torch.equal(q, v)


def block(out: int, rank: int = 2, gate: bool = True) -> Factors:
    new = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    return Factors(new(rank, 5), new(out, rank), new(rank) if gate else None, 0.7)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("adapters", [1, 2])
def test_gradcheck(p, adapters):
    members = [
        Member(
            torch.randn(out, 5, dtype=torch.float64),
            torch.randn(out, dtype=torch.float64) if out != 3 else None,
            [Term([block(out), block(out, 3, gate=False)], p / (i + 1)) for i in range(adapters)],
        )
        for out in (4, 3, 2)
    ]
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    leaves = [
        t for m in members for term in m.terms for f in term.blocks for t in (f.down, f.up, f.gate) if t is not None
    ]

    def run(*_: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        return low_rank_linears(x, members)

    assert torch.autograd.gradcheck(run, (x, *leaves))
    first, *_ = run()  # the others are left unused
    grads = torch.autograd.grad(first.sum(), [x, *leaves], allow_unused=True)
    torch.manual_seed(0)
    single = low_rank_linear(x, members[0].weight, members[0].bias, members[0].terms)  # type: ignore[arg-type]
    own = [t for term in members[0].terms for f in term.blocks for t in (f.down, f.up, f.gate) if t is not None]
    expected = torch.autograd.grad(single.sum(), [x, *own])
    for a, b in zip(grads, expected, strict=False):
        assert a is not None
        assert_close(a, b)
    assert all(g is None for g in grads[1 + len(own) :])


def test_a_replica_computes_alone():
    model = adapted().eval()
    q = layers(model)[0]
    replica = q._replicate_for_data_parallel()
    replica.index = q.index
    assert isinstance(replica.siblings, Siblings)
    assert replica.siblings.output(replica, replica.index, torch.randn(2, 16)) is None
