"""RaSA against its paper: golden values, parameter counts, what pools with what, and that a pool is one tensor."""

from __future__ import annotations

import doctest
import math
import re

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import rankfold.host.adapter
from rankfold import RasaConfig
from rankfold.host.adapter import module_type
from rankfold.host.linear_layer import AdaptedLinear
from rankfold.methods.rasa import Pool, Rasa

# PEFT 0.21 asks transformers 5.23 under the attribute's old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

L, OUT, IN, R, K, ALPHA = 3, 6, 5, 4, 2, 8


class Stack(nn.Module):
    """Layers `layers.i.proj` that all read one x."""

    def __init__(self, *outs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(IN, out)}) for out in outs or [OUT] * L)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer["proj"](x) for layer in self.layers]


def adapt(model: nn.Module, **kwargs) -> peft.PeftModel:
    kwargs = {"r": R, "shared_rank": K, "lora_alpha": ALPHA, "target_modules": ["proj"]} | kwargs
    return peft.get_peft_model(model, RasaConfig(**kwargs))


def layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, AdaptedLinear)}


def adapters(model: nn.Module) -> list[Rasa]:
    return [layer.lowrank_adapters["default"] for layer in layers(model).values()]


def pools(model: nn.Module) -> list[Pool]:
    return [m for m in model.modules() if isinstance(m, Pool)]


def det(shape: tuple[int, int], a: float, b: float, c: float) -> Tensor:
    """The spec's golden matrices."""
    p, q = torch.arange(shape[0]).double()[:, None], torch.arange(shape[1]).double()[None]
    return torch.sin(a + b * p + c * q + 0.1 * p * q)


@pytest.fixture
def golden() -> peft.PeftModel:
    """G1; d as it is at the start."""
    model = adapt(Stack()).double()
    with torch.no_grad():
        for i, adapter in enumerate(adapters(model)):
            adapter.up.copy_(det((6, 2), 0.1 + i, 0.3, 0.7))
            adapter.down.copy_(det((2, 5), 0.2 + i, 0.5, 0.9))
        (pool,) = pools(model)
        pool.up.copy_(det((6, 6), 1.3, 0.4, 1.1))
        pool.down.copy_(det((6, 5), 2.1, 0.8, 0.6))
    return model


X = torch.sin(torch.arange(1, IN + 1).double())


def added(model: peft.PeftModel, x: Tensor) -> list[Tensor]:
    """What the adapters add to each layer's output."""
    with_ = model(x)
    with model.disable_adapter():
        return [a - b for a, b in zip(with_, model(x), strict=True)]


# Golden values -------------------------------------------------------------------------------------------------------


def test_golden_d(golden):
    for adapter in adapters(golden):
        assert_close(adapter.gate, torch.tensor([2, 2, *[2 / 3] * 6], dtype=torch.float64), rtol=1e-7, atol=0)
        assert adapter.factors().rank == 8


def test_golden_forward(golden):
    golden_d(golden)
    for y, expected in zip(added(golden, X), (45.2122134539, 45.6722302148, 13.9115343466), strict=True):
        assert abs(y.sum().item() - expected) < 1e-9
    for layer, expected in zip(layers(golden).values(), (14.4085746626, 15.3155436464, 11.1053138822), strict=True):
        assert abs(layer.get_delta_weight("default").norm().item() - expected) < 1e-9
        assert abs(layer.lowrank_adapters["default"].factors().norm().item() - expected) < 1e-9


def golden_d(model: nn.Module) -> None:
    """d in float64: at the start it is written in float32, where ⅔ has only eight digits."""
    with torch.no_grad():
        for adapter in adapters(model):
            adapter.gate[: R - K] = 0.5 * ALPHA / (R - K)
            adapter.gate[R - K :] = 0.5 * ALPHA / (L * K)


def test_the_paper_formula(golden):
    """[B̃_i B_S] diag(d_i) [Ã_i ; A_S], private coordinates first."""
    (pool,) = pools(golden)
    for adapter in adapters(golden):
        nn.init.normal_(adapter.gate)
        up, down = torch.cat([adapter.up, pool.up], 1), torch.cat([adapter.down, pool.down])
        f = adapter.factors()
        assert torch.equal(f.up, up)
        assert torch.equal(f.down, down)
        assert torch.equal(f.gate, adapter.gate)
        assert f.scale == 1.0, "d carries the whole scale"
        assert_close(f.delta(), up @ torch.diag(adapter.gate) @ down)


def test_constant_d_is_the_form_before_the_diagonal(golden):
    (pool,) = pools(golden)
    for adapter in adapters(golden):
        nn.init.constant_(adapter.gate, ALPHA / R)
        assert_close(adapter.factors().delta(), ALPHA / R * (adapter.up @ adapter.down + pool.up @ pool.down))


def test_the_lowered_pair_in_plain_peft(golden):
    """A' = [Ã_i ; A_S], B' = [B̃_i B_S]·diag(d_i), scale 1, rank R = r−k+Lk."""
    for adapter in adapters(golden):
        nn.init.normal_(adapter.gate)
    rank = R - K + L * K
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["proj"])
    plain = Stack().double()
    plain.load_state_dict(
        {k.replace(".base_layer", ""): v for k, v in golden.get_base_model().state_dict().items() if "lowrank" not in k}
    )
    plain = peft.get_peft_model(plain, config).double()
    with torch.no_grad():
        for i, adapter in enumerate(adapters(golden)):
            layer, f = plain.get_base_model().layers[i]["proj"], adapter.factors().baked()
            layer.lora_A["default"].weight.copy_(f.down)
            layer.lora_B["default"].weight.copy_(f.up)
    x = torch.randn(7, IN, dtype=torch.float64)
    for a, b in zip(golden(x), plain(x), strict=True):
        assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("out", "rank"), [(6, 5), (4, 4)])
def test_rank_of_the_update(out, rank):
    """min(r−k+Lk, in, out) for random factors."""
    model = adapt(Stack(out, out, out), init_lora_weights=False).double()
    assert {int(torch.linalg.matrix_rank(a.factors().delta())) for a in adapters(model)} == {rank}
    narrow = adapt(Stack(out, out), r=2, shared_rank=1, init_lora_weights=False).double()
    assert {int(torch.linalg.matrix_rank(a.factors().delta())) for a in adapters(narrow)} == {2 - 1 + 2 * 1}


# The start -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 2, R])
def test_the_start_is_the_base(k):
    model = adapt(Stack(), shared_rank=k)
    x = torch.randn(7, IN)
    assert all(y.eq(0).all() for y in added(model, x))
    torch.stack(model(x)).square().sum().backward()
    for owner in [*adapters(model), *pools(model)]:
        for name, p in owner.named_parameters():
            if p.numel():
                assert p.grad.ne(0).any() == (name == "up"), name


@pytest.mark.parametrize(
    ("k", "private", "pooled"),
    [
        (0, ALPHA / R, None),  # as LoRA
        (1, 0.5 * ALPHA / (R - 1), 0.5 * ALPHA / L),
        (2, 0.5 * ALPHA / (R - 2), 0.5 * ALPHA / (2 * L)),
        (R, None, ALPHA / (L * R)),
    ],
)
@pytest.mark.parametrize("rslora", [False, True])
def test_d_at_the_start(k, private, pooled, rslora):
    model = adapt(Stack(), shared_rank=k, use_rslora=rslora)
    assert len(pools(model)) == (k > 0)
    more = math.sqrt(R) if rslora else 1.0
    for adapter in adapters(model):
        d = adapter.gate
        assert len(d) == R - k + L * k
        assert_close(d[: R - k], torch.full((R - k,), (private or 0) * more))
        assert_close(d[R - k :], torch.full((L * k,), (pooled or 0) * more))


@pytest.mark.parametrize(("alpha", "private", "pooled"), [(32, 2.285714, 0.5), (8, 0.571429, 0.125)])
def test_d_of_the_paper_settings(alpha, private, pooled):
    model = adapt(Stack(*[OUT] * 32), r=8, shared_rank=1, lora_alpha=alpha)
    d = adapters(model)[-1].gate
    assert_close(d[[0, -1]], torch.tensor([private, pooled]), atol=1e-6, rtol=0)


def test_first_values_are_kaiming():
    model = adapt(Stack(*[64] * 40), r=8, shared_rank=4)
    bound = 1 / math.sqrt(IN)
    (pool,) = pools(model)
    private = torch.cat([a.down for a in adapters(model)])
    for down in (pool.down, private):
        assert down.abs().max() <= bound
        assert abs(down.std() - bound / math.sqrt(3)) < 0.05 * bound
    assert all(t.eq(0).all() for t in [pool.up, *(a.up for a in adapters(model))])


@pytest.mark.parametrize(("r", "k"), [(1, 1), (2, 1), (8, 1), (16, 2), (20, 2), (32, 4), (64, 8)])
def test_default_k(r, k):
    assert RasaConfig(r=r).pooled(r) == k
    model = adapt(Stack(), r=r, shared_rank=None)
    assert pools(model)[0].down.shape == (L * k, IN)
    assert {a.factors().rank for a in adapters(model)} == {r - k + L * k}


# Parameters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 2, 3, R])
def test_parameter_count(k):
    lora = L * R * (OUT + IN)
    trained, _ = adapt(Stack(), shared_rank=k).get_nb_trainable_parameters()
    assert trained == lora + L * (R - k + L * k)
    assert lora == 132
    assert k != 2 or trained == 156


@pytest.mark.parametrize(
    "model", [(LlamaConfig, LlamaForCausalLM, 128256, 131072), (MistralConfig, MistralForCausalLM, 32768, 32768)]
)
@pytest.mark.parametrize(("r", "trained"), [(8, 20_980_256), (16, 41_960_512), (32, 83_921_024)])
def test_parameter_count_of_the_paper(model, r, trained):
    """Llama-3.1-8B and Mistral-7B-v0.3, with no weight made."""
    config_cls, model_cls, vocabulary, positions = model
    config = config_cls(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=vocabulary,
        max_position_embeddings=positions,
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with torch.device("meta"):
        adapted = adapt(model_cls(config), r=r, shared_rank=None, target_modules=targets)
    assert adapted.get_nb_trainable_parameters()[0] == trained
    assert {a.factors().rank for a in adapters(adapted)} == {{8: 39, 16: 78, 32: 156}[r]}
    assert len(pools(adapted)) == 7


# What pools with what ------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, vocab_size=32))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=32, n_positions=16))


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, vocab_size=32))


def bert() -> nn.Module:
    return BertModel(BertConfig(**SIZES, vocab_size=32, max_position_embeddings=16), add_pooling_layer=False)


def vit() -> nn.Module:
    return ViTModel(ViTConfig(**SIZES, image_size=8, patch_size=4), add_pooling_layer=False)


def types(model: nn.Module) -> dict[str, int]:
    """Name with its depths taken out and height of the update → height of its pool; checks that each has its own."""
    found: dict[str, set[Pool]] = {}
    for name, layer in layers(model).items():
        adapter = layer.lowrank_adapters["default"]
        pool = adapter.shared
        assert (pool.up.shape[0], pool.down.shape[1]) == (adapter.site.out_features, adapter.site.in_features)
        kind = re.sub(r"\b\d+\b", "*", name)
        found.setdefault(f"{kind}:{adapter.site.out_features}", set()).add(pool)
    assert all(len(shared) == 1 for shared in found.values()), "one pool a type"
    assert len(set().union(*found.values())) == len(found) == len(pools(model)), "no pool serves two types"
    return {kind: pool.down.shape[0] for kind, (pool,) in found.items()}


@pytest.mark.parametrize(
    ("make", "prefix", "expected"),
    [
        (llama, "model.layers.*.self_attn", {"q_proj:16": 3, "k_proj:8": 3, "v_proj:8": 3, "o_proj:16": 3}),
        (llama, "model.layers.*.mlp", {"gate_proj:24": 3, "up_proj:24": 3, "down_proj:16": 3}),
        (gpt2, "transformer.h.*.attn", {"c_attn:48": 3, "c_proj:16": 3}),
        (gpt2, "transformer.h.*.mlp", {"c_fc:64": 3, "c_proj:16": 3}),
        (t5, "encoder.block.*.layer.*.SelfAttention", {"q:16": 3, "k:16": 3, "v:16": 3, "o:16": 3}),
        (t5, "decoder.block.*.layer.*.SelfAttention", {"q:16": 2, "k:16": 2, "v:16": 2, "o:16": 2}),
        (t5, "decoder.block.*.layer.*.EncDecAttention", {"q:16": 2, "k:16": 2, "v:16": 2, "o:16": 2}),
        (t5, "encoder.block.*.layer.*.DenseReluDense", {"wi:24": 3, "wo:16": 3}),
        (t5, "decoder.block.*.layer.*.DenseReluDense", {"wi:24": 2, "wo:16": 2}),
        (bert, "encoder.layer.*.attention.self", {"query:16": 3, "key:16": 3, "value:16": 3}),
        (bert, "encoder.layer.*.attention.output", {"dense:16": 3}),
        (bert, "encoder.layer.*.intermediate", {"dense:24": 3}),
        (bert, "encoder.layer.*.output", {"dense:16": 3}),
    ],
)
def test_what_pools(make, prefix, expected):
    """The same projection of every layer: encoder, decoder and their two kinds of attention apart."""
    found = types(adapt(make(), target_modules="all-linear", shared_rank=1))
    assert {k: n for k, n in found.items() if k.rsplit(".", 1)[0] == prefix} == {
        f"{prefix}.{k}": n for k, n in expected.items()
    }


@pytest.mark.parametrize(("make", "kinds"), [(llama, 7), (gpt2, 4), (t5, 16), (bert, 6), (vit, 6)])
@pytest.mark.parametrize("k", [1, 2])
def test_how_many_pools(make, kinds, k):
    model = adapt(make(), target_modules="all-linear", shared_rank=k)
    found = types(model)
    assert len(found) == kinds
    assert set(found.values()) == ({3 * k, 2 * k} if make is t5 else {3 * k})
    lora = sum(R * (a.site.in_features + a.site.out_features) for a in adapters(model))
    assert model.get_nb_trainable_parameters()[0] == lora + sum(R - k + len(a.shared.down) for a in adapters(model))


def test_layers_of_another_shape_pool_among_themselves():
    model = adapt(Stack(6, 6, 8, 6, 8), shared_rank=1)
    assert sorted((p.up.shape[0], p.down.shape[0]) for p in pools(model)) == [(6, 3), (8, 2)]


def test_layers_to_transform_shrinks_the_pool():
    whole = adapt(llama(), target_modules=["q_proj"], shared_rank=2)
    part = adapt(llama(), target_modules=["q_proj"], shared_rank=2, layers_to_transform=[0, 2])
    assert [p.down.shape[0] for p in pools(whole)] == [6]
    assert [p.down.shape[0] for p in pools(part)] == [4]
    assert len(adapters(part)) == 2


@pytest.mark.parametrize("model", [llama, lambda: Stack()])
def test_a_rank_pattern_that_splits_a_type_is_refused_before_anything_is_touched(model):
    model = model()
    name = "q_proj" if isinstance(model, LlamaForCausalLM) else "proj"
    before = {n: id(m) for n, m in model.named_modules()}
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"rank_pattern gives .*{name}.* the ranks \[4, 6\].*one rank"):
        adapt(model, target_modules=[name, "v_proj"], rank_pattern={rf"layers\.1\..*{name}": 6})
    assert {n: id(m) for n, m in model.named_modules()} == before
    assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items())
    assert not layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_rank_pattern_by_type():
    model = adapt(llama(), r=8, shared_rank=None, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 16})
    rank = {n.rsplit(".", 1)[1]: m.lowrank_adapters["default"].factors().rank for n, m in layers(model).items()}
    assert rank == {"q_proj": 8 - 1 + 3 * 1, "v_proj": 16 - 2 + 3 * 2}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"r": 4, "shared_rank": 5},
        {"r": 4, "shared_rank": -1},
        {"r": 4, "shared_rank": 1.5},
        {"r": 8, "shared_rank": 4, "rank_pattern": {"q_proj": 2}},
    ],
)
def test_k_out_of_range(kwargs):
    with pytest.raises(ValueError, match=rf"RasaConfig: shared_rank={kwargs['shared_rank']} "):
        RasaConfig(**kwargs)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", "model.layers.*.self_attn.q_proj"),
        ("model.layers.31.mlp.gate_proj", "model.layers.*.mlp.gate_proj"),
        ("transformer.h.0.attn.c_attn", "transformer.h.*.attn.c_attn"),
        ("decoder.block.0.layer.1.EncDecAttention.q", "decoder.block.*.layer.*.EncDecAttention.q"),
        ("encoder.block.0.layer.0.SelfAttention.q", "encoder.block.*.layer.*.SelfAttention.q"),
        ("bert.encoder.layer.11.attention.output.dense", "bert.encoder.layer.*.attention.output.dense"),
        ("h.0.mlp.experts.7.w1", "h.*.mlp.experts.7.w1"),
        ("h.0.mlp.2", "h.*.mlp.2"),
        ("4", "*"),
        ("blocks.4", "blocks.*"),
        ("lm_head", "lm_head"),
        ("layer1.conv2", "layer1.conv2"),
    ],
)
def test_module_type(name, expected):
    assert module_type(name) == expected


def test_examples_in_docstrings():
    finder = doctest.DocTestFinder()
    runner = doctest.DocTestRunner()
    for test in finder.find(module_type, globs=vars(rankfold.host.adapter)):
        runner.run(test)
    assert runner.summarize().failed == 0
    assert runner.tries == 2


# One storage ---------------------------------------------------------------------------------------------------------


def test_a_pool_has_one_storage(golden):
    (pool,) = pools(golden)
    for adapter in adapters(golden):
        _, shared = adapter.blocks()
        assert shared.down is pool.down
        assert shared.up is pool.up
    assert [n for n, _ in golden.named_parameters(remove_duplicate=False) if "shared" in n] == [
        n for n, _ in golden.named_parameters() if "shared" in n
    ], "no second name"
    before = [layer.get_delta_weight("default") for layer in layers(golden).values()]
    with torch.no_grad():
        pool.up[0, 0] += 1.0
    for layer, old in zip(layers(golden).values(), before, strict=True):
        change = layer.get_delta_weight("default") - old
        assert change[0].ne(0).all(), "every layer sees the edit"
        assert change[1:].abs().max() < 1e-12
    assert all(y[0].abs() > 1e-3 for y in added(golden, X))


def test_the_pool_gradient_is_the_sum_over_layers(golden):
    (pool,) = pools(golden)
    single = [torch.autograd.grad(y.square().sum(), pool.up)[0] for y in golden(X)]
    torch.stack(golden(X)).square().sum().backward()
    assert_close(pool.up.grad, torch.stack(single).sum(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_pool_stays_one_through_casts(dtype):
    model = adapt(Stack(), init_lora_weights=False).to(dtype)
    (pool,) = pools(model)
    assert pool.up.dtype == dtype
    assert all(a.shared is pool and a.down.dtype == dtype for a in adapters(model))
    assert {a.gate.dtype for a in adapters(model)} == {torch.promote_types(dtype, torch.float32)}
    assert model(torch.randn(2, IN, dtype=dtype))[0].dtype == dtype


@pytest.mark.parametrize("k", [0, 2, R])
def test_saved_once(golden, tmp_path, k):
    model = adapt(Stack(), shared_rank=k, init_lora_weights=False)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    trained, _ = model.get_nb_trainable_parameters()
    assert sum(t.numel() for t in stored.values()) == trained
    assert sum("shared" in name for name in stored) == 2 * (k > 0)
    assert len(stored) == (3 if k < R else 1) * L + 2 * (k > 0)  # k = r leaves no private factors
    base = Stack()
    base.load_state_dict(
        {n.replace(".base_layer", ""): t for n, t in model.get_base_model().state_dict().items() if "lowrank" not in n}
    )
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    x = torch.randn(7, IN)
    assert all(torch.equal(a, b) for a, b in zip(model(x), again(x), strict=True))
    assert len(pools(again)) == (k > 0)
