"""The hand-written autograd: gradcheck in every mode, PEFT's LoRA as the reference, and what is kept for the backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import product

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from rankfold import Factors, PlainLoraConfig, RasaConfig
from rankfold.kernel.fused_pass import Columns, FusedPass
from rankfold.kernel.layout import Member, Term, flatten_for_autograd
from rankfold.kernel.linears import (
    in_separate_order,
    low_rank_linear,
    low_rank_linears,
    low_rank_update,
    separate_order,
)

# PEFT 0.21 asks transformers 5.23 under the attribute's old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

OUT, IN = 4, 5

#: Where x lies in memory: name → (shape of the leaf, view of it that is x).
LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "1d": ((IN,), lambda t: t),
    "2d": ((3, IN), lambda t: t),
    "3d": ((2, 3, IN), lambda t: t),
    "4d": ((2, 1, 2, IN), lambda t: t),
    "2d transposed": ((IN, 3), lambda t: t.T),
    "3d batch second": ((3, 2, IN), lambda t: t.transpose(0, 1)),
    "3d features first": ((IN, 2, 3), lambda t: t.permute(1, 2, 0)),
    "3d every other": ((2, 3, 2 * IN), lambda t: t[..., ::2]),
    "3d expanded": ((1, 3, IN), lambda t: t.expand(2, 3, IN)),
    "4d heads": ((2, 2, 2, IN), lambda t: t.transpose(1, 2)),
}


def block(rank: int = 2, gate: bool = True, scale: float = 0.7, dtype: torch.dtype = torch.float64) -> Factors:
    kwargs = {"dtype": dtype, "requires_grad": True}
    return Factors(
        torch.randn(rank, IN, **kwargs),
        torch.randn(OUT, rank, **kwargs),
        torch.randn(rank, **kwargs) if gate else None,
        scale,
    )


def leaves(terms: Sequence[Term]) -> list[Tensor]:
    return [t for term in terms for f in term.blocks for t in (f.down, f.up, f.gate) if t is not None]


def base(dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> tuple[Tensor, Tensor]:
    kwargs = {"dtype": dtype, "requires_grad": requires_grad}
    return torch.randn(OUT, IN, **kwargs), torch.randn(OUT, **kwargs)


def naive(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]) -> Tensor:
    """The dense formula; dropout left out."""
    y = torch.einsum("...i,oi->...o", x, weight)
    y = y if bias is None else y + bias
    for term in terms:
        for f in term.blocks:
            y = y + torch.einsum("...i,oi->...o", x, f.delta())
    return y


def gradcheck(run: Callable[[], Tensor], inputs: Sequence[Tensor]) -> bool:
    """Analytic against numeric derivative; every evaluation draws the same dropout masks."""

    def seeded(*_: Tensor) -> Tensor:
        torch.manual_seed(1)
        return run()

    return torch.autograd.gradcheck(seeded, tuple(t for t in inputs if t.requires_grad))


TERMS: dict[str, Callable[[float], list[Term]]] = {
    "one block": lambda p: [Term([block(gate=False)], p)],
    "gated": lambda p: [Term([block()], p)],
    "two blocks": lambda p: [Term([block(2), block(3, gate=False, scale=-1.3)], p)],
    "two adapters": lambda p: [Term([block(gate=False)], p), Term([block(1), block(7)], p / 2)],
    "rank 0": lambda p: [Term([block(0), block(0, gate=False), block(2)], p)],
    "nothing but rank 0": lambda p: [Term([block(0)], p)],
}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("entry", ["linear", "linear without bias", "update"])
def test_gradcheck(entry, terms, dropout):
    terms = TERMS[terms](dropout)
    leaf = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    weight, bias = base()
    if entry == "update":
        y = torch.randn(2, 3, OUT, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda: low_rank_update(y, leaf, terms), [y, leaf, *leaves(terms)])
    else:
        bias = bias if entry == "linear" else None
        assert gradcheck(lambda: low_rank_linear(leaf, weight, bias, terms), [leaf, *leaves(terms)])


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_every_layout_of_x(layout, dropout):
    shape, view = LAYOUTS[layout]
    leaf = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, bias = base()
    terms = [Term([block()], dropout)]
    assert gradcheck(lambda: low_rank_linear(view(leaf), weight, bias, terms), [leaf, *leaves(terms)])
    y = torch.randn(*view(leaf).shape[:-1], OUT, dtype=torch.float64)
    assert gradcheck(lambda: low_rank_update(y, view(leaf), terms), [leaf, *leaves(terms)])


@pytest.mark.parametrize("trained", ["down", "up", "gate", "x", "weight", "bias", "weight bias", "down gate", "x up"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck_with_the_rest_frozen(trained, dropout):
    weight, bias = base()
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    f = block().detach()
    tensors = {"down": f.down, "up": f.up, "gate": f.gate, "x": x, "weight": weight, "bias": bias}
    for name in trained.split():
        tensors[name].requires_grad_()
    terms = [Term([f], dropout)]
    assert gradcheck(lambda: low_rank_linear(x, weight, bias, terms), list(tensors.values()))
    low_rank_linear(x, weight, bias, terms).sum().backward()
    assert {n for n, t in tensors.items() if t.grad is not None} == set(trained.split())


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_dense_formula(layout, terms, separate):
    shape, view = LAYOUTS[layout]
    x = view(torch.randn(shape, dtype=torch.float64))
    weight, bias = base()
    terms = TERMS[terms](0.0)
    for b in (bias, None):
        expected = naive(x, weight, b, terms)
        with separate_order() if separate else torch.enable_grad():
            assert_close(low_rank_linear(x, weight, b, terms), expected)
            assert_close(low_rank_linear(x, weight.T.contiguous().T, b, terms), expected)  # Conv1D's weight
            y = naive(x, weight, b, [])
            assert_close(low_rank_update(y, x, terms), expected)


@pytest.mark.parametrize("separate", [False, True])
def test_no_terms_is_the_base(separate):
    x = torch.randn(3, IN)
    weight, bias = base(torch.float32)
    y = nn.functional.linear(x, weight, bias)
    with separate_order() if separate else torch.enable_grad():
        for terms in ([], [Term([])], [Term([], 0.3)]):
            assert torch.equal(low_rank_linear(x, weight, bias, terms), y)
            assert torch.equal(low_rank_update(y, x, terms), y)


def test_a_rank_0_block_gets_an_empty_gradient():
    """None would make DistributedDataParallel wait for it for ever: RaSA with k = r has such blocks."""
    f = block(0)
    low_rank_linear(torch.randn(3, IN, dtype=torch.float64), *base(), [Term([f, block()], 0.1)]).sum().backward()
    assert [t.grad.shape for t in leaves([Term([f])])] == [(0, IN), (OUT, 0), (0,)]


# Dropout -------------------------------------------------------------------------------------------------------------


def dropped(x: Tensor, terms: Sequence[Term]) -> Tensor:
    return low_rank_linear(x, torch.zeros(IN, IN), None, terms)


@pytest.mark.parametrize("separate", [False, True])
def test_dropout_is_inverted_dropout_on_the_input(separate):
    x = 1 + torch.rand(4000, IN)
    eye = Factors(torch.eye(IN), torch.eye(IN))
    with separate_order() if separate else torch.enable_grad():
        y = dropped(x, [Term([eye], 0.3)])
        kept = y != 0
        keep = 0.7 if separate else 1 - 77 / 256  # fused: a byte of random bits an element
        assert_close(y[kept], (x / keep)[kept])
        assert abs(kept.float().mean() - 0.7) < 0.02
        negative = Factors(torch.eye(IN), -torch.eye(IN))
        assert dropped(x, [Term([eye, negative], 0.3)]).eq(0).all(), "blocks of one adapter see one mask"
        assert dropped(x, [Term([eye], 0.3), Term([negative], 0.3)]).ne(0).any(), "adapters draw their own"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_both_orders_use_masks_alike(dtype, masks_of_peft):
    x = torch.randn(2, 50, IN, dtype=dtype, requires_grad=True)
    weight, bias = base(dtype)
    terms = [Term([block(dtype=dtype), block(3, dtype=dtype)], 0.3), Term([block(dtype=dtype)], 0.1)]

    def run() -> list[Tensor]:
        torch.manual_seed(3)
        y = low_rank_linear(x, weight, bias, terms)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *leaves(terms)])]

    fused = run()
    with separate_order():
        separate = run()
    rtol = {torch.float32: 1e-4, torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]
    for a, b in zip(fused, separate, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= rtol * b.norm()


@pytest.mark.parametrize("dropout", [0.999999, math.nextafter(1.0, 0.0), 1.0])
def test_dropout_near_1(dropout):
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    weight, bias = base()
    terms = [Term([block()], dropout)]
    torch.manual_seed(0)
    y = low_rank_linear(x, weight, bias, terms)
    assert_close(y, naive(x, weight, bias, []))
    grads = torch.autograd.grad(y.sum(), [x, *leaves(terms)])
    assert_close(grads[0], weight.sum(0).expand(3, IN))
    assert all(g.eq(0).all() for g in grads[1:])


def test_dropout_0_leaves_the_random_numbers_alone():
    x, (weight, bias), terms = torch.randn(3, IN), base(torch.float32), [Term([_f32()], 0.0)]
    before = torch.get_rng_state()
    low_rank_linear(x, weight, bias, terms)
    assert torch.equal(before, torch.get_rng_state())


def _f32(rank: int = 2, gate: bool = True) -> Factors:
    return block(rank, gate, dtype=torch.float32)


# PEFT ----------------------------------------------------------------------------------------------------------------


def llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    return BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=16))


def gpt2() -> nn.Module:
    """Conv1D: its weight is transposed."""
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16))


def batch(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.randint(32, (3, 7), generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": ids,
        "labels": torch.tensor([0, 1, 1]) if isinstance(model, BertForSequenceClassification) else ids,
    }


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("make", [llama, bert, gpt2])
def test_separate_order_is_bit_equal_to_peft(make, dropout, masks_of_peft):
    common = {"r": 4, "lora_alpha": 6, "lora_dropout": dropout, "target_modules": "all-linear"}
    common["fan_in_fan_out"] = make is gpt2
    models = []
    for config in (peft.LoraConfig(**common, init_lora_weights=False), PlainLoraConfig(**common)):
        torch.manual_seed(0)
        models.append(peft.get_peft_model(make(), config).train())
    reference, ours = models
    names = {
        "lowrank_adapters.default.down": "lora_A.default.weight",
        "lowrank_adapters.default.up": "lora_B.default.weight",
    }
    theirs = dict(reference.named_parameters())

    def twin(name: str) -> Tensor:
        for a, b in names.items():
            name = name.replace(a, b)
        return theirs[name]

    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.copy_(twin(name))

    def loss(model: nn.Module) -> Tensor:
        torch.manual_seed(7)
        model.zero_grad()
        value = model(**batch(model.get_base_model())).loss
        value.backward()
        return value

    expected = loss(reference)
    with separate_order():
        assert torch.equal(loss(ours), expected)
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert len(trained) >= 2 * 2 * 4
    for name, p in trained.items():
        assert torch.equal(p.grad, twin(name).grad), name
    assert_close(loss(ours), expected)
    for name, p in trained.items():
        assert (p.grad - twin(name).grad).norm() <= 1e-4 * twin(name).grad.norm() + 1e-7, name


# Dtypes --------------------------------------------------------------------------------------------------------------


def check_against_float64(
    run: Callable[..., Tensor], x: Tensor, base: Sequence[Tensor], terms: Sequence[Term], tol: float
):
    """Output, input gradient and factor gradients of a low-precision run, to `tol` of each one's norm."""

    def everything(x: Tensor, terms: Sequence[Term], y: Tensor) -> list[Tensor]:
        return [y.detach(), *torch.autograd.grad(y.double().square().sum(), [x, *leaves(terms)])]

    wide_x = x.detach().double().requires_grad_()
    wide = [Term([f.detach().to(torch.float64) for f in t.blocks]) for t in terms]
    for t in leaves(wide):
        t.requires_grad_()
    expected = everything(wide_x, wide, naive(wide_x, *[t.double() for t in base], wide))
    found = everything(x, terms, run())
    for got, want, t in zip(found[1:], expected[1:], [x, *leaves(terms)], strict=True):
        assert got.dtype == t.dtype, "a gradient has its tensor's dtype"
        assert (got.double() - want).norm() <= tol * want.norm()
    assert (found[0].double() - expected[0]).norm() <= tol * expected[0].norm()
    return found[0]


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gate", [None, torch.float32])
def test_bfloat16_input(factors, gate):
    x = torch.randn(2, 30, IN, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = base(torch.bfloat16)
    f = block(gate=False, dtype=factors)
    if gate is not None:
        f = Factors(f.down, f.up, torch.randn(2, dtype=gate, requires_grad=True), f.scale)
    terms = [Term([f])]
    y = check_against_float64(lambda: low_rank_linear(x, weight, bias, terms), x, (weight, bias), terms, 0.03)
    assert y.dtype == torch.bfloat16

    def update() -> Tensor:
        return low_rank_update(nn.functional.linear(x, weight, bias), x, terms)

    assert check_against_float64(update, x, (weight, bias), terms, 0.03).dtype == torch.bfloat16


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("entry", ["linear", "update"])
def test_autocast(entry, dtype, inside):
    """`inside`: the backward too runs inside autocast, which must not change its dtypes."""
    x = torch.randn(2, 30, IN, requires_grad=True)
    weight, bias = base(torch.float32)
    terms = [Term([_f32(), _f32(3, gate=False)])]

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            if entry == "linear":
                return low_rank_linear(x, weight, bias, terms)
            return low_rank_update(nn.functional.linear(x, weight, bias), x, terms)

    with torch.autocast("cpu", dtype=dtype, enabled=inside):
        assert check_against_float64(run, x, (weight, bias), terms, 0.03).dtype == dtype


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("entry", ["linear", "update"])
def test_backward_inside_autocast_of_a_forward_outside(entry, dropout):
    x = torch.randn(2, 3, IN, requires_grad=True)
    weight, bias = base(torch.float32)
    terms = [Term([_f32()], dropout)]
    y = low_rank_linear(x, weight, bias, terms)
    if entry == "update":
        y = low_rank_update(torch.randn(2, 3, OUT), x, terms)
    wanted = [x, *leaves(terms)]
    expected = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(y.sum(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_float64_stays_float64_under_autocast():
    x = torch.randn(3, IN, dtype=torch.float64)
    weight, bias = base()
    terms = [Term([_f32()])]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = low_rank_linear(x, weight, bias, terms)
    assert y.dtype == torch.float64
    assert_close(y, low_rank_linear(x, weight, bias, terms))


# Modes of autograd ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("separate", [False, True])
def test_gradient_checkpointing(reentrant, separate):
    x = torch.randn(2, 3, IN, requires_grad=True)
    weight, bias = base(torch.float32)
    terms = [Term([_f32(), _f32(3)], 0.4)]

    def grads(wrap: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(5)
        return list(_grads_by_backward(wrap(x).square().sum(), [x, *leaves(terms)]))

    def layer(x: Tensor) -> Tensor:
        return low_rank_linear(x.tanh(), weight, bias, terms)

    with separate_order() if separate else torch.enable_grad():
        expected = grads(layer)
        found = grads(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _grads_by_backward(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Through `.backward()`: reentrant checkpointing refuses `torch.autograd.grad`."""
    for t in tensors:
        t.grad = None
    loss.backward()
    return [t.grad for t in tensors]


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("separate", [False, True])
def test_double_backward(dropout, separate):
    """Gradient penalties, Hessian-vector products: right, where they were silently zero."""
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    weight, bias = base()
    bias = bias.clone().requires_grad_()
    down, up, gate = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, IN), (OUT, 2), (2,)))

    def run(x: Tensor, bias: Tensor, down: Tensor, up: Tensor, gate: Tensor) -> Tensor:
        torch.manual_seed(0)
        terms = [Term([Factors(down, up, gate, 0.5), Factors(up.T[:, :1].expand(2, IN), up)], dropout)]
        return low_rank_linear(x, weight, bias, terms).square()

    with separate_order() if separate else nullcontext():
        assert torch.autograd.gradgradcheck(run, (x, bias, down, up, gate))


def test_double_backward_where_the_input_is_not_kept_names_the_way():
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    weight, bias = base()
    frozen = Factors(
        torch.randn(2, IN, dtype=torch.float64), torch.randn(OUT, 2, dtype=torch.float64, requires_grad=True)
    )
    y = low_rank_linear(x, weight, bias, [Term([frozen])])
    with pytest.raises(RuntimeError, match=r"separate_order\(\)"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, in jvp
def test_torch_func():
    x, (weight, bias), terms = torch.randn(3, IN, dtype=torch.float64), base(), [Term([block()])]

    def loss(x: Tensor) -> Tensor:
        return low_rank_linear(x, weight, bias, terms).square().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert_close(torch.func.grad(loss)(x), expected)
    assert_close(torch.func.vmap(torch.func.grad(loss))(x), expected)
    tangent = torch.randn_like(x)
    assert_close(torch.func.jvp(loss, (x,), (tangent,))[1], (expected * tangent).sum())


def test_separate_order_takes_a_gate_beside_half_precision_factors():
    factors = Factors(
        torch.randn(2, IN, dtype=torch.bfloat16), torch.randn(OUT, 2, dtype=torch.bfloat16), torch.randn(2)
    )
    x, weight = torch.randn(3, IN, dtype=torch.bfloat16), torch.randn(OUT, IN, dtype=torch.bfloat16)
    with separate_order():
        y = low_rank_linear(x, weight, None, [Term([factors])])
    assert_close(y, low_rank_linear(x, weight, None, [Term([factors])]), rtol=5e-2, atol=5e-1)


def test_separate_order_is_of_this_thread():
    with separate_order(), ThreadPoolExecutor(1) as pool:
        assert in_separate_order()
        assert not pool.submit(in_separate_order).result()


@pytest.mark.parametrize("shape", [(3, IN), (2, 3, IN), (2, 2, 3, IN)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_can_be_written_to(shape, bias):
    """`hidden += residual` and ReLU(inplace=True) are common in models."""
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, b = base()
    b = b if bias else None
    terms = [Term([block()])]
    frozen = naive(x, weight, b, []).detach()
    for run in (lambda b: low_rank_linear(x, weight, b, terms), lambda _: low_rank_update(frozen, x, terms)):
        expected = torch.autograd.grad(run(b).add(1).relu().sum(), [x, *leaves(terms)])
        found = torch.autograd.grad(run(b).add_(1).relu_().sum(), [x, *leaves(terms)])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    before = frozen.clone()
    low_rank_update(frozen, x, terms).add_(1)
    assert torch.equal(frozen, before), "the base's own output is not written to"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("entry", ["linear", "update"])
def test_inference(mode, entry):
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    weight, bias = base()
    terms = [Term([block(), block(3)])]
    with mode():
        if entry == "linear":
            y = low_rank_linear(x, weight, bias, terms)
        else:
            y = low_rank_update(naive(x, weight, bias, []), x, terms)
        assert not y.requires_grad
        assert_close(y, naive(x, weight, bias, terms))


@pytest.mark.parametrize("shape", [(0, IN), (0, 3, IN), (2, 0, IN)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("entry", ["linear", "update"])
def test_empty_batch(shape, dropout, entry):
    x = torch.randn(shape, requires_grad=True)
    weight, bias = base(torch.float32)
    terms = [Term([_f32()], dropout)]
    y = low_rank_linear(x, weight, bias, terms)
    if entry == "update":
        y = low_rank_update(torch.randn(*shape[:-1], OUT), x, terms)
    assert y.shape == (*shape[:-1], OUT)
    grads = torch.autograd.grad(y.sum(), [x, *leaves(terms)])
    assert [g.shape for g in grads] == [t.shape for t in [x, *leaves(terms)]]
    assert all(g.eq(0).all() for g in grads)


@pytest.mark.parametrize("entry", ["linear", "update"])
def test_meta_device(entry):
    """Shapes and FLOPs of a model too large to load."""
    x = torch.empty(2, 3, IN, device="meta", requires_grad=True)
    weight, bias = (t.to("meta") for t in base(torch.float32))
    f = _f32().detach().to("meta")
    f.down.requires_grad_()
    f.gate.requires_grad_()
    y = low_rank_linear(x, weight, bias, [Term([f], 0.1)])
    if entry == "update":
        y = low_rank_update(torch.empty(2, 3, OUT, device="meta"), x, [Term([f], 0.1)])
    assert y.shape == (2, 3, OUT)
    y.sum().backward()
    assert (x.grad.shape, f.down.grad.shape, f.gate.grad.shape) == (x.shape, f.down.shape, (2,))


def test_separate_order_ends_with_its_block():
    x = torch.randn(3, IN, requires_grad=True)
    weight, bias = base(torch.float32)

    def fused() -> bool:
        y = low_rank_linear(x, weight, bias, [Term([_f32()])])
        return "LowRankLinears" in type(y.grad_fn).__name__

    def broken() -> None:
        with separate_order(), separate_order():
            assert not fused()
            raise KeyError("out of both blocks")

    with pytest.raises(KeyError):
        broken()
    assert fused()


# torch.compile -------------------------------------------------------------------------------------------------------

# Dynamo itself instantiates torch.autograd.Function, which torch deprecates
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def compiled_equals_eager(backend: str, dropout: float, autocast: bool = False) -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 3, IN, requires_grad=True)
    weight, bias = base(torch.float32)
    frozen = torch.randn(2, 3, OUT)
    terms = [Term([_f32(), _f32(3, gate=False)], dropout), Term([_f32(0), _f32(1)])]

    def layer(x: Tensor) -> Tensor:
        y = low_rank_linear(x.tanh(), weight, bias, terms)
        return y.sin() + low_rank_update(frozen, x, terms)

    def run(layer: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = layer(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *leaves(terms)])]

    expected = run(layer)
    found = run(torch.compile(layer, fullgraph=True, backend=backend))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, rtol=3e-2 if autocast else 1e-4, atol=3e-2 if autocast else 1e-5)


@compiles
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compile_without_a_graph_break(dropout, autocast, masks_of_peft):
    compiled_equals_eager("aot_eager", dropout, autocast)


@compiles
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compile_with_dynamic_shapes(dropout, masks_of_peft):
    """Two layers × two terms: a float in the layout becomes a symbol there."""
    torch._dynamo.reset()
    weight, bias = base(torch.float32)
    terms = [[Term([_f32(), _f32(3, gate=False)], dropout)] for _ in range(4)]
    back = torch.randn(OUT, IN)

    def net(x: Tensor) -> Tensor:
        a, b = low_rank_linears(x, [Member(weight, bias, terms[0]), Member(weight.clone(), None, terms[1])])
        return low_rank_linear((a * b) @ back, weight, bias, terms[2])

    run = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (3, 5):
        x = torch.randn(2, n, IN, requires_grad=True)
        torch.manual_seed(0)
        expected = torch.autograd.grad(net(x).square().sum(), [x, *leaves(terms[0])])
        torch.manual_seed(0)
        found = torch.autograd.grad(run(x).square().sum(), [x, *leaves(terms[0])])
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, rtol=1e-4, atol=1e-4)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compile_with_inductor(dropout, masks_of_peft):
    with torch._inductor.config.patch(fallback_random=True):  # eager's random numbers
        compiled_equals_eager("inductor", dropout)


@compiles
def test_a_compiled_layer_follows_separate_order():
    torch._dynamo.reset()
    x = torch.randn(3, IN)
    weight, bias = base(torch.float32)
    terms = [Term([_f32()])]
    run = torch.compile(lambda x: low_rank_linear(x, weight, bias, terms), fullgraph=True, backend="aot_eager")
    assert "_LowRankLinear" in type(low_rank_linear(x, weight, bias, terms).grad_fn).__name__
    with torch.no_grad():
        fused = run(x)
        with separate_order():
            assert torch.equal(run(x), low_rank_linear(x, weight, bias, terms))
        assert torch.equal(run(x), fused)


# What is kept for the backward ---------------------------------------------------------------------------------------


def saved(run: Callable[[], Tensor], ignore: Sequence[Tensor]) -> dict[int, Tensor]:
    """What autograd keeps, one per storage, apart from `ignore` (parameters)."""
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    known = {t.untyped_storage().data_ptr() for t in ignore}
    return {ptr: t for ptr, t in kept.items() if ptr not in known}


def bytes_of(kept: dict[int, Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, IN), (4, 10, IN)])
def test_saved_bytes(shape, dtype):
    n, width = 40, dtype.itemsize
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    siblings = [base(dtype) for _ in range(3)]  # q, k and v read one x
    ranks = [(2,), (3, 2), (2, 0)]  # no sum is OUT, which would look like an output

    def kept(dropout: float) -> dict[int, Tensor]:
        terms = [[Term([_f32(r) for r in rs], dropout)] for rs in ranks]
        parameters = [*(t for pair in siblings for t in pair), *(t for ts in terms for t in leaves(ts))]
        outputs: list[Tensor] = []
        run = zip(siblings, terms, strict=True)
        found = saved(lambda: outputs.extend(low_rank_linear(x, w, b, t) for (w, b), t in run), parameters)
        assert not found.keys() & {y.untyped_storage().data_ptr() for y in outputs}, "no output is kept"
        assert all(t.numel() != n * OUT for t in found.values()), "nothing of size N×out"
        return found

    hidden = n * sum(map(sum, ranks)) * width
    without = kept(0.0)
    assert x.data_ptr() in without, "x itself and no copy"
    assert bytes_of(without) == n * IN * width + hidden
    masked = kept(0.3)
    assert bytes_of(masked) == n * IN * width + hidden + 3 * n * IN, "one byte an element of each layer's mask"
    assert {t.dtype for t in masked.values()} == {dtype, torch.bool}


def test_saved_bytes_of_an_update():
    n = 40
    x, y = torch.randn(n, IN, requires_grad=True), torch.randn(n, OUT, requires_grad=True)
    terms = [Term([_f32(2), _f32(3)], 0.3)]
    kept = saved(lambda: low_rank_update(y, x, terms), leaves(terms))
    assert x.data_ptr() in kept
    assert bytes_of(kept) == n * IN * 4 + n * 5 * 4 + n * IN


@pytest.mark.parametrize("frozen", ["down", "down and gate", "up"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_frozen_factors(frozen, dropout):
    """The other gradients are what they are with everything trained, and where every `down` is frozen no x is kept."""
    n, (weight, bias) = 40, base(torch.float32)
    members = [
        Member(weight, bias, [Term([_f32(2), _f32(3)], dropout)]),
        Member(weight, None, [Term([_f32(2)], dropout)]),
    ]
    blocks = [f for m in members for t in m.terms for f in t.blocks]
    x = torch.randn(n, IN, requires_grad=True)

    def run() -> list[Tensor | None]:
        for t in (x, *(t for f in blocks for t in (f.down, f.up, f.gate) if t is not None)):
            t.grad = None
        torch.manual_seed(0)
        sum(y.square().sum() for y in low_rank_linears(x, members)).backward()
        return [x.grad, *(t.grad for f in blocks for t in (f.down, f.up, f.gate) if t is not None)]

    wanted = run()
    for f in blocks:
        for name in frozen.split(" and "):
            getattr(f, name).requires_grad_(False)
    trained = [x, *(t for f in blocks for t in (f.down, f.up, f.gate) if t is not None)]
    for got, want, leaf in zip(run(), wanted, trained, strict=True):
        assert torch.equal(got, want) if leaf.requires_grad else got is None
    kept = saved(
        lambda: low_rank_linears(x, members)[0], [weight, bias, *(t for m in members for t in leaves(m.terms))]
    )
    assert (x.data_ptr() in kept) is (frozen == "up")


def selecting(which: str, rank: int, dtype: torch.dtype = torch.float64, scale: float = 0.7) -> tuple[Factors, Factors]:
    """The same update twice, a frozen `down` (or `up`) made of rows of the identity: with its places told, and without."""
    size = IN if which == "down" else OUT
    index = torch.randperm(size)[:rank]
    chosen = torch.eye(size, dtype=dtype)[index]
    trained = torch.randn((OUT, rank) if which == "down" else (rank, IN), dtype=dtype, requires_grad=True)
    if which == "down":
        return Factors(chosen, trained, None, scale, down_index=index), Factors(chosen, trained, None, scale)
    return Factors(trained, chosen.T, None, scale, up_index=index), Factors(trained, chosen.T, None, scale)


@pytest.mark.parametrize("kinds", [("down", "down"), ("up", "up"), ("down", "up"), ("down", None), ("up", None)])
@pytest.mark.parametrize("dropout", [0.0, 0.05, 0.3])
def test_factors_that_select_columns(kinds, dropout):
    """Gathered and scattered, they give what the products with their rows of the identity give, several members too."""
    torch.manual_seed(3)
    pairs = [selecting(kind, rank) for kind, rank in zip(kinds, (2, 3), strict=True) if kind]
    pairs += [(f, f) for f in [Factors(block().down, block().up, None, 0.7)] if None in kinds]
    x = torch.randn(6, IN, dtype=torch.float64, requires_grad=True)
    (weight, bias), cotangent = base(), torch.randn(6, OUT, dtype=torch.float64)

    def run(told: int) -> list[Tensor]:
        one, two = (pair[told] for pair in pairs)
        members = [Member(weight, bias, [Term([one], dropout)]), Member(weight, None, [Term([two], dropout)])]
        call = FusedPass(*flatten_for_autograd(x, members))
        assert isinstance(call.down([0, 1], 0, x.dtype), Columns) is (told == 0 and set(kinds) == {"down"})
        gathered = [isinstance(call.up(i, 0, x.dtype)[0], Columns) for i in (0, 1)]
        assert gathered == [told == 0 and kind == "up" for kind in kinds]
        torch.manual_seed(0)
        outputs = low_rank_linears(x, members)
        leaves_ = [x, *(t for f in (one, two) for t in (f.down, f.up) if t.requires_grad)]
        return [*outputs, *torch.autograd.grad([*outputs], leaves_, [cotangent, 2 * cotangent])]

    for got, want in zip(run(0), run(1), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("which", ["down", "up"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_that_select_multiply_half_as_much(which, dtype):
    n, (weight, bias) = 40, base(dtype)
    told, untold = selecting(which, 3, torch.float32)
    x = torch.randn(n, IN, dtype=dtype, requires_grad=True)

    def addmm_(y: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
        return 2 * a[0] * a[1] * b[1]

    flops = []
    for f in (told, untold):
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_}) as counter:
            low_rank_linear(x, weight, bias, [Term([f])]).sum().backward()
        flops.append(counter.get_total_flops() - 4 * n * IN * OUT)
    other = OUT if which == "down" else IN
    assert flops == [6 * n * 3 * other, 4 * n * 3 * (IN + OUT) + 2 * n * 3 * other]
    kept = saved(lambda: low_rank_linear(x, weight, bias, [Term([told])]), [weight, bias, told.down, told.up])
    assert (x.data_ptr() in kept) is (which == "up")


@pytest.mark.parametrize("which", ["down", "up"])
def test_gradcheck_of_factors_that_select(which):
    f, _ = selecting(which, 3)
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    weight, bias = base()
    trained = f.up if which == "down" else f.down
    assert torch.autograd.gradcheck(lambda x, _: low_rank_linear(x, weight, bias, [Term([f])]), (x, trained))


def test_a_gate_takes_the_usual_way():
    """Places are a hint: with a gate, the matrices are multiplied."""
    for which in ("up", "down"):
        told, _ = selecting(which, 2)
        f = Factors(told.down, told.up, torch.rand(2, dtype=torch.float64), told.scale, told.down_index, told.up_index)
        x, (weight, bias) = torch.randn(4, IN, dtype=torch.float64), base()
        assert_close(low_rank_linear(x, weight, bias, [Term([f])]), naive(x, weight, bias, [Term([f])]))


@pytest.mark.parametrize("inside", [torch.bfloat16, torch.float16])
def test_autocast_with_factors_in_the_other_half(inside):
    other = torch.float16 if inside == torch.bfloat16 else torch.bfloat16
    members = [Member(*base(torch.float32), [Term([block(2, dtype=other), block(1, dtype=other)])]) for _ in range(2)]
    x = torch.randn(6, IN, requires_grad=True)
    with torch.autocast("cpu", inside):
        outputs = low_rank_linears(x, members)
    for y, m in zip(outputs, members, strict=True):
        assert y.dtype == inside
        wide = [Term([f.detach().to(torch.float32) for f in t.blocks]) for t in m.terms]
        assert_close(y.float(), naive(x, m.weight, m.bias, wide), atol=0.1, rtol=0.1)
    sum(y.float().sum() for y in outputs).backward()
    assert all(t.grad is not None and t.grad.dtype == t.dtype for m in members for t in leaves(m.terms))


@pytest.mark.parametrize("dropout", [0.0, 0.05, 0.3])
def test_no_rows(dropout):
    """As an expert gets them that no token chose."""
    terms = [Term([_f32(2)], dropout)]
    x = torch.randn(0, IN, requires_grad=True)
    y = low_rank_linear(x, *base(torch.float32), terms)
    y.sum().backward()
    assert y.shape == (0, OUT)
    assert all(not t.grad.any() for t in leaves(terms))


def test_saved_bytes_under_autocast():
    """The half-precision x is kept, and no float32 copy; each sibling has its own where x came in float32."""
    n = 40
    weight, bias = base(torch.float32)
    terms = [Term([_f32(2)])]
    x = torch.randn(n, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = saved(lambda: low_rank_linear(x, weight, bias, terms), leaves(terms))
        assert bytes_of(kept) == 2 * (n * IN + n * 2 + weight.numel())
        half = x.detach().bfloat16().requires_grad_()
        kept = saved(lambda: low_rank_linear(half, weight, bias, terms), leaves(terms))
        assert half.data_ptr() in kept


def test_saved_bytes_of_a_model():
    """q, k and v share one x, gate and up another, through AdaptedLinear; RaSA's pool is kept by reference."""
    model = llama()
    config = RasaConfig(r=4, shared_rank=1, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    inputs: dict[str, set[int]] = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "AdaptedLinear":
            where = name.rsplit(".", 1)[0]
            module.register_forward_pre_hook(
                lambda _, args, where=where: inputs.setdefault(where, set()).add(args[0].data_ptr())
            )
    ids = torch.randint(32, (2, 9))
    kept = saved(lambda: model(input_ids=ids).logits, list(model.parameters()))
    assert [len(ptrs) for ptrs in inputs.values()] == [1, 1]
    h = [t for t in kept.values() if t.shape == (18, 3 * (3 + 2))]  # of q, k and v: r−k private and Lk pooled each
    assert len(h) == 2
    assert set().union(*inputs.values()) <= kept.keys()


def test_flops():
    """Of forward and backward, as torch counts: 4·N·in·out for the frozen base and 6·N·r·(in + out) for the blocks."""

    def addmm_(y: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:  # torch's table has only addmm
        return 2 * a[0] * a[1] * b[1]

    for n, (r1, r2), p in product((8, 20), ((2, 3), (4, 0)), (0.0, 0.3)):
        x = torch.randn(n, IN, requires_grad=True)
        weight, bias = base(torch.float32)
        terms = [Term([_f32(r1), _f32(r2, gate=False)], p)]
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_}) as counter:
            low_rank_linear(x, weight, bias, terms).sum().backward()
        assert counter.get_total_flops() == 4 * n * IN * OUT + 6 * n * (r1 + r2) * (IN + OUT)


@pytest.mark.parametrize("ranks", [(1,), (2,), (1, 1)])
def test_gradients_are_laid_out_as_their_factors(ranks):
    """DDP's buckets mind the strides; a rank-1 `up` had those of its transpose."""
    terms = [Term([_f32(r) for r in ranks])]
    low_rank_linear(torch.randn(7, IN), torch.randn(OUT, IN), None, terms).sum().backward()
    assert all(t.grad.stride() == t.stride() for t in leaves(terms) if t.grad is not None)
    assert sum(t.grad is not None for t in leaves(terms)) >= 2 * len(ranks)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_narrower_than_the_input_round_once(dtype):
    f = Factors(torch.ones(2, 256, dtype=dtype), torch.randn(256, 2, dtype=dtype, requires_grad=True), scale=1e-3)
    y = low_rank_linear(torch.ones(64, 256), torch.randn(256, 256), None, [Term([f])])
    (found,) = torch.autograd.grad(y, f.up, torch.full_like(y, 10.0))
    assert (found == torch.tensor(64 * 256 * 10 * 1e-3).to(dtype)).all()


# The merged order -------------------------------------------------------------------------------------------------------


def merges(x: Tensor, *members: Member) -> list[bool]:
    call = FusedPass(*flatten_for_autograd(x, members))
    return [call.merges(i, len(x)) for i in range(len(members))]


def wide(out: int, rank: int, dtype: torch.dtype = torch.float32, into: int = 48, dropout: float = 0.0) -> Member:
    new = lambda *shape: (torch.randn(*shape, dtype=dtype) * 0.1).requires_grad_()  # noqa: E731
    blocks = [Factors(new(rank, into), new(out, rank), new(rank), 0.5), Factors(new(2, into), new(out, 2), None, 2.0)]
    return Member(torch.randn(out, into, dtype=dtype), torch.randn(out, dtype=dtype), [Term(blocks, dropout)])


def test_many_tokens_of_float32_multiply_by_the_merged_weight():
    x = torch.randn(2000, 48)
    assert merges(x, wide(40, 20), wide(8, 20)) == [True, True]
    assert merges(x[:4], wide(40, 20)) == [False]
    assert merges(x, wide(40, 20, dropout=0.1)) == [False]
    assert merges(x.bfloat16(), wide(40, 20, torch.bfloat16)) == [False]  # W + ΔW would lose small updates


@pytest.mark.parametrize("tokens", [60, 800, 3000])
def test_the_merged_order_differs_by_rounding_only(tokens: int):
    """Bound: every output and gradient within 3e-6 of its own size of the same in float64, as the separate order is."""
    torch.manual_seed(0)
    x = torch.randn(tokens, 48, requires_grad=True)
    members = [wide(40, 20), wide(8, 20)]
    assert merges(x, *members) == [tokens > 60, True]
    tensors = [x, *(t for m in members for f in m.terms[0].blocks for t in (f.down, f.up, f.gate) if t is not None)]

    def run(double: bool) -> list[Tensor]:
        cast = (lambda t: None if t is None else t.detach().double().requires_grad_()) if double else (lambda t: t)
        inputs = {id(t): cast(t) for t in tensors}
        own = [
            Member(
                m.weight.double() if double else m.weight,
                m.bias.double() if double else m.bias,
                [Term([Factors(inputs[id(f.down)], inputs[id(f.up)], f.gate if f.gate is None else inputs[id(f.gate)], f.scale) for f in m.terms[0].blocks])],
            )
            for m in members
        ]  # fmt: skip
        with separate_order() if double else nullcontext():
            outputs = low_rank_linears(inputs[id(x)], own)
        loss = sum(
            (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)).sum() for y in outputs
        )
        return [*outputs, *torch.autograd.grad(loss, list(inputs.values()))]

    for found, expected in zip(run(False), run(True), strict=True):
        assert (found.double() - expected).norm() <= 3e-6 * expected.norm()
