"""ResLoRA: golden values, what the shortcuts are and what flows through them, and where they cannot run."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from models import LLAMA
from peft import PeftModel, get_peft_model
from table import LIVE, Row, adapt, assert_same, layers, snapshot
from test_table import det
from tokenizers import Tokenizer as Words
from tokenizers import models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from rankfold import PlainLoraConfig, ResLoraConfig
from rankfold.doctor import diagnose
from rankfold.errors import RankfoldError
from rankfold.fold import fold_adapter, fold_model
from rankfold.inspect import inspect_adapter
from rankfold.methods.res_lora_adapter import WINDOW
from rankfold.methods.res_lora_merge import Rules, approximate, norm_of_merged

IS, MS = LIVE


class Stack(nn.Module):
    """Linear layers of one type, each on an input of its own."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"lin": nn.Linear(i, o, bias=False)}) for o, i in shapes)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [layer["lin"](x) for layer, x in zip(self.layers, xs, strict=True)]


def golden(shortcut: str, previous: int = 1) -> tuple[Any, list[Tensor]]:
    """G6's modules 0 to 3, and their inputs."""
    config = ResLoraConfig(r=2, lora_alpha=4, shortcut=shortcut, previous=previous, target_modules=["lin"])
    model: Any = get_peft_model(Stack([(6, 6)] * 4), config).double()  # pyright: ignore[reportArgumentType]
    for i, layer in enumerate(layers(model).values()):
        pair = layer.lowrank_adapters["default"].pair
        with torch.no_grad():
            pair.down.copy_(det((2, 6), 0.2 + i, 0.5, 0.3))
            pair.up.copy_(det((6, 2), 0.8 + i, 0.4, 0.6))
            layer.get_base_weight().copy_(det((6, 6), 0.1 * i, 0.9, 1.3))
    return model, [det((3, 6), 0.7 + i, 1.1, 0.2) for i in range(4)]


@pytest.mark.parametrize(
    ("shortcut", "previous", "wanted"),
    [("bs", 2, -29.6280360474), ("is", 1, -111.5268501377), ("ms", 2, -32.2907178150)],
)
def test_golden(shortcut: str, previous: int, wanted: float) -> None:
    model, xs = golden(shortcut, previous)
    found = model(xs)[3] - xs[3] @ list(layers(model).values())[3].get_base_weight().T
    assert found.sum().item() == pytest.approx(wanted, abs=1e-9)


# What comes near --------------------------------------------------------------------------------------------------------


def placed(model: nn.Module) -> dict[str, Any]:
    return {n: (layer, layer.lowrank_adapters["default"]) for n, layer in layers(model).items()}


def recorded(shortcut: str, previous: int = 1) -> tuple[Any, list[Tensor]]:
    model, xs = golden(shortcut, previous)
    model.train()(xs)
    return model, xs


@pytest.mark.parametrize(
    ("shortcut", "previous", "rule", "alpha", "wanted"),
    [
        ("is", 1, "bi", 0.8828657085, -80.2891848333),
        ("ms", 2, "bi", 1.4194267788, -103.1692292005),
        ("ms", 2, "bw", None, 47.9318806930),
    ],
)
def test_golden_approximations(shortcut: str, previous: int, rule: str, alpha: float | None, wanted: float) -> None:
    model, xs = recorded(shortcut, previous)
    *_, (name, (layer, _)) = placed(model).items()
    if alpha is not None:
        assert Rules(placed(model), rule).alpha(name) == pytest.approx(alpha, abs=1e-9)
    weight = layer.get_base_weight().clone()
    approximate(model, rule)
    found = model.eval()(xs)[3] - xs[3] @ weight.T
    assert found.sum().item() == pytest.approx(wanted, abs=1e-9)
    model.merge_adapter()
    torch.testing.assert_close(model(xs)[3] - xs[3] @ weight.T, found)


def test_golden_norms_by_weights_leave_the_base_alone() -> None:
    model, _ = golden("is")
    before = snapshot(model)
    by_place = list(placed(model).values())
    plain = [norm_of_merged(*one, alpha=0.0) for one in by_place]
    assert plain[1] / plain[2] == pytest.approx(1.1867777552, abs=1e-9)
    rules, names = Rules(placed(model), "bw"), list(placed(model))
    alphas = [rules.alpha(n) for n in names]
    assert alphas[:2] == [1.0, 1.0]
    for n in (2, 3):  # by hand, in depth order
        norms = [norm_of_merged(*by_place[k], alphas[k]) for k in (n - 2, n - 1)]
        assert alphas[n] == pytest.approx(norms[0] / norms[1], rel=1e-12)
    approximate(model, "bw")()
    assert_same(snapshot(model), before)


def test_proportional_inputs_merge_exactly() -> None:
    """x_{n-1} = c·x_n: α* = c by the norms, and nothing is lost. The first module sees its own input twice."""
    model, xs = golden("is")
    xs = [xs[0] * f for f in (1.0, 0.5, 2.0, 0.25)]
    wanted = model.train()(xs)
    assert [Rules(placed(model), "bi").alpha(n) for n in placed(model)] == pytest.approx([1.0, 2.0, 0.25, 8.0])
    approximate(model, "bi")
    for found, one in zip(model.eval()(xs), wanted, strict=True):
        torch.testing.assert_close(found, one)


def test_norms_are_a_window_of_training_forwards(tmp_path: Path) -> None:
    model = adapt(LLAMA, IS)
    with pytest.raises(RankfoldError, match=r"no norms were recorded at .*q_proj"):
        approximate(model, "bi")
    LLAMA.out(model)
    first = layers(model)["model.layers.0.self_attn.q_proj"].lowrank_adapters["default"]
    assert not first.input_norms.any()
    model.train()
    for _ in range(WINDOW + 3):
        first.forward(torch.zeros(1, 16), torch.ones(1, 16))
    assert first.input_norms.tolist() == pytest.approx([4.0] * WINDOW)
    LLAMA.loss(model)
    rules = Rules(placed(model), "bi")
    alphas = {n: rules.alpha(n) for n in placed(model)}
    model.save_pretrained(tmp_path)
    again: Any = PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    assert {n: Rules(placed(again), "bi").alpha(n) for n in placed(again)} == alphas


@pytest.mark.parametrize("rule", ["bi", "bw"])
def test_in_place_it_is_a_plain_adapter_and_can_be_taken_back(rule: str, tmp_path: Path) -> None:
    model = adapt(LLAMA, MS).train()
    LLAMA.loss(model)
    before, wanted = snapshot(model), LLAMA.out(model.eval())
    undo = approximate(model, rule)
    near = LLAMA.out(model)
    assert not torch.allclose(near, wanted, atol=1e-3)
    model.save_pretrained(tmp_path)
    again: Any = PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    assert again.peft_config["default"].shortcut == "bs"
    assert torch.equal(LLAMA.out(again), near)
    merged = again.merge_and_unload()
    torch.testing.assert_close(LLAMA.out(merged), near, rtol=1e-4, atol=1e-5)
    undo()
    assert_same(snapshot(model), before)
    assert torch.equal(LLAMA.out(model), wanted)
    with pytest.raises(RankfoldError, match="rule='x' must be"):
        approximate(model, "x")
    with pytest.raises(RankfoldError, match="must be a ResLoRA"):
        approximate(again, "bi")


# What flows through a shortcut --------------------------------------------------------------------------------------------


def random(shortcut: str, shapes: list[tuple[int, int]], previous: int = 1, **fields: Any) -> Any:
    config = ResLoraConfig(
        r=2, shortcut=shortcut, previous=previous, target_modules=["lin"], init_lora_weights=False, **fields
    )
    torch.manual_seed(0)
    return get_peft_model(Stack(shapes), config).double()  # pyright: ignore[reportArgumentType]


def pairs_of(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [layer.lowrank_adapters["default"].pair() for layer in layers(model).values()]  # pyright: ignore


@pytest.mark.parametrize("shortcut", ["bs", "ms"])
def test_without_links_it_is_lora(shortcut: str) -> None:
    model = random(shortcut, [(6, 6)] * 3, previous=0)
    torch.manual_seed(0)
    config = PlainLoraConfig(r=2, target_modules=["lin"], init_lora_weights=False)
    lora: Any = get_peft_model(Stack([(6, 6)] * 3), config).double()  # pyright: ignore[reportArgumentType]
    xs = [torch.randn(4, 6, dtype=torch.float64) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(model(xs), lora(xs), strict=True))
    model.merge_adapter()


def test_gradients_of_a_pair_are_summed_over_the_modules_that_use_it() -> None:
    model, xs = random("bs", [(6, 6)] * 4, previous=2), [torch.randn(4, 6, dtype=torch.float64) for _ in range(4)]
    outs = model(xs)
    for k, pair in enumerate(pairs_of(model)):
        whole = torch.autograd.grad(sum(o.square().sum() for o in outs), pair, retain_graph=True)
        parts = [torch.autograd.grad(outs[n].square().sum(), pair, retain_graph=True) for n in range(k, min(k + 3, 4))]
        for i in (0, 1):
            torch.testing.assert_close(whole[i], sum(p[i] for p in parts))
        if k + 3 < 4:
            assert torch.autograd.grad(outs[k + 3].sum(), pair, retain_graph=True, allow_unused=True) == (None, None)


def test_inputs_and_middles_pass_their_gradients_on() -> None:
    """Nothing is detached: is, to the input before; ms, to the A before."""
    xs = [torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    model = random("is", [(6, 6)] * 2)
    (down, up), g = pairs_of(model)[1], torch.randn(4, 6, dtype=torch.float64)
    (found,) = torch.autograd.grad(model(xs)[1], xs[0], g)
    torch.testing.assert_close(found, 4 * g @ up @ down)  # B_n A_n and no factor in between
    model = random("ms", [(6, 6)] * 2)
    assert torch.autograd.grad(model(xs)[1].sum(), pairs_of(model)[0][0])[0].any()


def test_the_first_input_is_doubled() -> None:
    model, x = random("is", [(6, 6)]), torch.randn(4, 6, dtype=torch.float64)
    ((down, up),) = pairs_of(model)
    base = next(iter(layers(model).values())).base_layer
    torch.testing.assert_close(model([x])[0], base(x) + 4 * (2 * x) @ down.T @ up.T)


def test_a_chain_is_cut_where_the_shape_changes() -> None:
    shapes = [(6, 6), (6, 6), (6, 4), (6, 6)]
    model = random("bs", shapes, previous=-1)
    assert [layer.lowrank_adapters["default"].factors().rank for layer in layers(model).values()] == [2, 4, 2, 2]
    for shortcut in ("is", "ms"):
        model = random(shortcut, shapes)
        model([torch.randn(3, i, dtype=torch.float64) for _, i in shapes])
        assert not model.base_model.model.lowrank_shared["default"]["lin"].passes.running


def test_ranks_that_differ_cannot_meet_in_the_middle() -> None:
    with pytest.raises(
        RankfoldError, match=r"layers.0.lin the rank 2 and layers.1.lin, .* 3; shortcut=.ms. needs one rank"
    ):
        random("ms", [(6, 6)] * 2, rank_pattern={"layers.1.lin": 3})
    random("bs", [(6, 6)] * 2, rank_pattern={"layers.1.lin": 3})


# Where it runs, and where not ---------------------------------------------------------------------------------------------


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("row", LIVE, ids=str)
def test_checkpointing(row: Row) -> None:
    """The same gradients, also where two forwards wait; reentrant checkpointing cuts the shortcut, and is refused."""
    model = adapt(LLAMA, row, lora_dropout=0.3).train()
    base: Any = model.get_base_model()
    model.enable_input_require_grads()
    found = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(0)
        losses = [LLAMA.loss(model, LLAMA.inputs(seed=seed)) for seed in (0, 1)]
        sum(losses).backward()
        found.append(grads(model))
        base.activation_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    base.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RankfoldError, match="'use_reentrant': False"):
        LLAMA.loss(model).backward()


@pytest.mark.parametrize("row", LIVE, ids=str)
def test_nothing_outlives_a_forward(row: Row) -> None:
    model = adapt(LLAMA, row).train()
    seen: list[weakref.ref] = []
    hooks = [
        layer.register_forward_pre_hook(lambda m, args: seen.append(weakref.ref(args[0])))
        for layer in layers(model).values()
    ]
    LLAMA.loss(model).backward()
    LLAMA.out(model)
    broken = layers(model)["model.layers.1.mlp.down_proj"].register_forward_pre_hook(lambda m, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        LLAMA.out(model)
    broken.remove()
    for hook in hooks:
        hook.remove()
    gc.collect()
    assert seen
    assert not any(one() is not None for one in seen)
    with pytest.raises(RankfoldError, match=r"layers.1.self_attn.q_proj needs .* outside the model's forward"):
        layers(model)["model.layers.1.self_attn.q_proj"](torch.randn(1, 2, 16))
    assert torch.isfinite(LLAMA.out(model)).all()


@pytest.mark.parametrize("row", LIVE, ids=str)
def test_a_skipped_layer_and_a_layer_called_twice_are_refused(row: Row) -> None:
    model = adapt(LLAMA, row)
    inner: Any = model.get_base_model().model
    whole = inner.layers
    for order, named in (((0, 2), "was not called in this forward"), ((0, 0, 1), "was called twice in one forward")):
        inner.layers = nn.ModuleList(whole[i] for i in order)
        inner.config.num_hidden_layers = len(order)
        with pytest.raises(RankfoldError, match=named):
            LLAMA.out(model)


# The command ----------------------------------------------------------------------------------------------------------------


def test_a_fold_refuses_by_name_and_approximates_when_asked(tmp_path: Path) -> None:
    LLAMA.build().save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    words = Words(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(tmp_path / "base")
    (tmp_path / "texts.txt").write_text("w5 w6 w7 w8 w9\n\nw11 w3 w4 w12")
    model = adapt(LLAMA, IS).train()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    LLAMA.loss(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    sentence = r"ResLoRA: its update depends on the input.*rankfold fold ADAPTER -o OUT --approximate bi\|bw$"
    for ask in (
        lambda: fold_adapter(tmp_path / "adapter", tmp_path / "no"),
        lambda: fold_model(model, tmp_path / "no"),
    ):
        with pytest.raises(RankfoldError, match=sentence):
            ask()
    for ask in (model.merge_adapter, model.merge_and_unload, lambda: inspect_adapter(model)):
        with pytest.raises(RankfoldError, match=r"its update depends on the input.*--approximate bi\|bw$"):
            ask()
    fixes = [f.fix for verdict in diagnose(tmp_path / "adapter").verdicts for f in verdict.findings if f.fix]
    assert any(fix.endswith("--approximate bi|bw") for fix in fixes)

    before, wanted = snapshot(model), LLAMA.out(model)
    live = fold_model(model, tmp_path / "live", approximate="bi", calibration=tmp_path / "texts.txt")
    assert_same(snapshot(model), before)
    assert torch.equal(LLAMA.out(model), wanted)
    report = fold_adapter(tmp_path / "adapter", tmp_path / "out", approximate="bi", calibration=tmp_path / "texts.txt")
    near = report.approximation
    assert near is not None
    assert live.approximation is not None
    assert near.change_error == pytest.approx(live.approximation.change_error, rel=1e-4)
    folded: Any = PeftModel.from_pretrained(LLAMA.build(), str(tmp_path / "out")).eval()
    off = change = 0.0
    for ids in (torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[11, 3, 4, 12]])):
        with torch.no_grad():
            exact = model(input_ids=ids).logits
            off += (folded(input_ids=ids).logits - exact).square().sum().item()
            with model.disable_adapter():
                change += (model(input_ids=ids).logits - exact).square().sum().item()
    assert near.change_error == pytest.approx((off / change) ** 0.5, rel=1e-3)
    assert near.change_error > 0.01
    written = json.loads((tmp_path / "out" / "fold_report.json").read_text())
    assert written["approximation"]["change_error"] == near.change_error
    card = (tmp_path / "out" / "README.md").read_text()
    assert "no LoRA equals this adapter" in card
    assert "of what the adapter changes" in card.replace("\n", " ")
    assert report.probe["max_logit_error"] > 0
    unmeasured = fold_adapter(tmp_path / "adapter", tmp_path / "bw", approximate="bw", probe=False)
    assert "was not measured: give --calibration" in unmeasured.summary()
    with pytest.raises(RankfoldError, match="rule='x' must be"):
        fold_adapter(tmp_path / "adapter", tmp_path / "no", approximate="x")
    assert not (tmp_path / "no").exists()
