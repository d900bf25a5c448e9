"""What a step does at the edges: missing, infinite and zero gradients, dead ranks, hooks, closures, scalers, schedulers, options."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from one_pair import A0, B0, GS, give, loss, pair
from small_llama import TARGETS, adapted, batch, train, trained
from torch import Tensor, nn

from rankfold import ColaConfig, SoraConfig, XgbLoraConfig, attach
from rankfold.errors import RankfoldError
from rankfold.optim import LoraFa, LoraPlus, LoraPro, LoraRite, Riemannian
from rankfold.optim.create import create
from rankfold.optim.pairs import Pair
from rankfold.optim.registry import OPTIMIZERS

RULES: list[tuple[Any, dict[str, Any]]] = [
    (LoraPro, {}), (LoraPro, {"mode": "efficient"}), (LoraPro, {"mode": "sgd"}), (LoraRite, {}), (LoraRite, {"escape": False}),
    (LoraFa, {}), (Riemannian, {}), (Riemannian, {"base": "sgd", "reg": 0.0}),
]  # fmt: skip


def values(pairs: list[Pair]) -> list[Tensor]:
    return [t.detach().clone() for p in pairs for t in (p.down, p.up)]


# Singular factors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "options"), RULES, ids=str)
@pytest.mark.parametrize("start", ["up 0", "down 0", "both 0", "dead rank", "twins", "tiny"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_singular_factors(cls: Any, options: dict[str, Any], start: str, dtype: torch.dtype) -> None:
    """No NaN and no explosion from zero factors, dead ranks and equal columns, for as long as it takes to leave them."""
    a, b = A0.clone(), B0.clone()
    if start in ("down 0", "both 0"):
        a.zero_()
    if start in ("up 0", "both 0"):
        b.zero_()
    if start == "dead rank":
        a[1], b[:, 1] = 0, 0
    if start == "twins":
        a[1], b[:, 1] = a[0], b[:, 0]
    if start == "tiny":
        b *= 1e-20
    p = pair(a.to(dtype), b.to(dtype))
    optimizer = cls([p], lr=1e-3, **options)
    first = loss(p).item()
    for _ in range(5):
        optimizer.zero_grad()
        loss(p).backward()
        optimizer.step()
    assert all(torch.isfinite(v).all() for v in values([p]))
    assert loss(p).item() <= 1.01 * first
    if start == "both 0":
        assert not p.down.any()
        assert not p.up.any()


@pytest.mark.parametrize(("cls", "options"), RULES, ids=str)
def test_an_empty_pair_is_left_alone(cls: Any, options: dict[str, Any]) -> None:
    empty = Pair("empty", nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.zeros(5, 0)))
    p = pair()
    optimizer = cls([empty, p], lr=0.1, **options)
    give(p, GS)
    empty.down.grad, empty.up.grad = torch.zeros(0, 4), torch.zeros(5, 0)
    optimizer.step()
    assert not torch.equal(p.up, B0)


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "options"), RULES, ids=str)
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")], ids=str)
def test_a_bad_gradient_leaves_its_pair_out(cls: Any, options: dict[str, Any], bad: float | None) -> None:
    """Its factors, its state and its count of steps; the other pairs of its stack go on as if it were not there."""
    together = [pair(name="one"), pair(A0 + 1, B0 - 1, name="two"), pair(A0 - 1, B0 + 1, name="three")]
    alone = [pair(name="one"), pair(A0 - 1, B0 + 1, name="three")]
    some = cls(together, lr=0.01, clip=0.0, **options) if cls is LoraRite else cls(together, lr=0.01, **options)
    others = cls(alone, lr=0.01, clip=0.0, **options) if cls is LoraRite else cls(alone, lr=0.01, **options)
    for step in range(4):
        for p in together + alone:
            give(p, GS + step)
        if step in (0, 2):
            two = together[1]
            if bad is None:
                two.down.grad = two.up.grad = None
            else:
                assert two.up.grad is not None
                two.up.grad[1, 1] = bad
        before = values(together[1:2])
        with (
            pytest.warns(UserWarning, match="1 of 3 pairs .the first: two. have NaN")
            if bad and step in (0, 2)
            else nullcontext()
        ):
            some.step()
        others.step()
        if step in (0, 2):
            assert all(torch.equal(x, y) for x, y in zip(before, values(together[1:2]), strict=True))
    for x, y in zip(values([together[0], together[2]]), values(alone), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-13)
    assert [some.state[p.up]["step"] for p in together] == [4, 2, 4]
    # two steps of its own are the first two steps of a pair that sees these gradients
    fresh = pair(A0 + 1, B0 - 1)
    optimizer = cls([fresh], lr=0.01, clip=0.0, **options) if cls is LoraRite else cls([fresh], lr=0.01, **options)
    for step in (1, 3):
        give(fresh, GS + step)
        optimizer.step()
    for x, y in zip(values(together[1:2]), values([fresh]), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("cls", "options"), RULES, ids=str)
def test_a_pair_whose_state_is_dropped_starts_anew(cls: Any, options: dict[str, Any]) -> None:
    """As a chain of LoRAs does at a knot; the other pairs of its stack keep theirs."""
    options = {**options, "clip": 0.0} if cls is LoraRite else options
    one, two = pair(name="one"), pair(A0 + 1, B0 - 1, name="two")
    optimizer = cls([one, two], lr=0.01, **options)
    for step in range(2):
        give(one, GS + step)
        give(two, GS + step)
        optimizer.step()
    optimizer.state.pop(one.up)
    fresh = pair(one.down.detach(), one.up.detach())
    other = cls([fresh], lr=0.01, **options)
    for p in (one, two, fresh):
        give(p, GS)
    optimizer.step()
    other.step()
    for x, y in zip(values([one]), values([fresh]), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-13)
    assert [optimizer.state[p.up]["step"] for p in (one, two)] == [1, 3]


@pytest.mark.parametrize(("cls", "options"), RULES, ids=str)
def test_gradients_are_left_as_they_were(cls: Any, options: dict[str, Any]) -> None:
    p = pair()
    optimizer = cls([p], lr=0.01, **options)
    give(p, GS)
    grads = [g.clone() for g in (p.down.grad, p.up.grad) if g is not None]
    optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(grads, (p.down.grad, p.up.grad), strict=True) if y is not None)


def test_nothing_has_a_gradient() -> None:
    for cls, options in RULES:
        p = pair()
        cls([p], lr=0.01, **options).step()
        assert torch.equal(p.up, B0)


@pytest.mark.parametrize("scale", [1.0, 2.0**10])
@pytest.mark.parametrize(("cls", "options"), RULES, ids=str)
def test_grad_scaler(cls: Any, options: dict[str, Any], scale: float) -> None:
    plain, scaled = pair(), pair()
    optimizers = [cls([p], lr=0.01, **options) for p in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
    for step in range(4):
        for o in optimizers:
            o.zero_grad()
        loss(plain).backward()
        scaler.scale(loss(scaled)).backward()  # pyright: ignore[reportAttributeAccessIssue]
        if step == 2:  # an overflow: the scaler skips this step
            assert scaled.up.grad is not None
            scaled.up.grad[0, 0] = float("inf")
        else:
            optimizers[0].step()
        scaler.step(optimizers[1])
        scaler.update()
        if step == 2:
            scaler.update(scale)
    for x, y in zip(values([plain]), values([scaled]), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


# The torch interface --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_closure_hooks_and_scheduler(name: str) -> None:
    model = adapted()
    optimizer = create(name, model, 0.01)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    first = [g["lr"] for g in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def closure() -> Tensor:
        optimizer.zero_grad()
        ids = batch(0)
        found = model(input_ids=ids, labels=ids).loss
        found.backward()
        return found

    before = trained(model)
    result = optimizer.step(closure)
    assert torch.is_tensor(result)
    assert seen == ["before", "after"]
    assert any(not torch.equal(v, before[n]) for n, v in trained(model).items())
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [lr / 2 for lr in first]
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.0)
    before = trained(model)
    closure()
    optimizer.step()
    assert all(torch.equal(v, before[n]) for n, v in trained(model).items())


@pytest.mark.parametrize(("cls", "options"), RULES, ids=str)
def test_what_is_plain_is_adamw(cls: Any, options: dict[str, Any]) -> None:
    """A head, stepped bit for bit as torch.optim.AdamW does, with its own learning rate, and a group that is added later."""
    decay = {} if options.get("mode") == "sgd" else {"weight_decay": 0.1}
    model = adapted(modules_to_save=["lm_head"])
    optimizer = cls(model, lr=0.01, plain_lr=0.003, **options, **decay)
    head = next(p for n, p in model.named_parameters() if "lm_head" in n and p.requires_grad)
    norm = next(p for n, p in model.named_parameters() if "norm" in n)
    assert [len(g["params"]) for g in optimizer.param_groups[1:]] == [1]
    optimizer.add_param_group({"params": [norm], "weight_decay": 0.0, "lr": 0.002})
    twins = [nn.Parameter(p.detach().clone()) for p in (head, norm)]
    settings = {"betas": (0.9, 0.999), "eps": optimizer.param_groups[1]["eps"]}
    reference = torch.optim.AdamW([{"params": twins[:1], "lr": 0.003, "weight_decay": decay.get("weight_decay", 0.0)}, {"params": twins[1:], "lr": 0.002, "weight_decay": 0.0}], **settings)  # fmt: skip
    for _ in range(3):
        for twin, p in zip(twins, (head, norm), strict=True):
            p.grad = torch.randn_like(p)
            twin.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    assert torch.equal(head, twins[0])
    assert torch.equal(norm, twins[1])
    with pytest.raises(RankfoldError, match="add_param_group: kind='pairs' must be 'plain'"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "kind": "pairs"})


def test_vectors_are_not_decayed() -> None:
    model = adapted(use_dora=True, modules_to_save=["lm_head"])
    for optimizer in (LoraRite(model, weight_decay=0.1), LoraPlus(model, weight_decay=0.1)):
        for group in optimizer.param_groups:
            assert {p.ndim for p in group["params"]} in ({1}, {2})
            assert group["weight_decay"] == (0.1 if group["params"][0].ndim == 2 else 0.0)


def test_lora_plus_groups() -> None:
    """Linear, embedding, DoRA, head with bias and norm: who learns how fast."""
    model = adapted(target_modules=["q_proj", "embed_tokens"], use_dora=True, modules_to_save=["lm_head", "norm"])
    rates = {id(p): g["lr"] for g in LoraPlus.groups(model, 1e-3, ratio=8.0) for p in g["params"]}
    assert len(rates) == sum(p.requires_grad for p in model.parameters())
    for name, p in model.named_parameters():
        if p.requires_grad:
            wanted = 1e-6 if "lora_embedding" in name else 8e-3 if "lora_B" in name else 1e-3
            assert rates[id(p)] == wanted, name
    rates = {
        id(p): g["lr"] for g in LoraPlus.groups(model, 1e-3, embedding_lr=None, plain_lr=5e-4) for p in g["params"]
    }
    for name, p in model.named_parameters():
        if p.requires_grad:
            wanted = 16e-3 if "_B" in name else 1e-3 if "_A" in name else 5e-4
            assert rates[id(p)] == wanted, name


@pytest.mark.parametrize("make", [
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=5), lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
], ids=["cosine", "warm-up"])  # fmt: skip
def test_lora_plus_keeps_its_ratio_under_a_scheduler(make: Any) -> None:
    model = adapted()
    optimizer = LoraPlus(model, lr=1e-3, ratio=8.0)
    optimizer.add_param_group({"params": [next(p for n, p in model.named_parameters() if "norm" in n)]})
    scheduler = make(optimizer)
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        down, up, later = (g["lr"] for g in optimizer.param_groups)
        assert up == pytest.approx(8 * down, rel=1e-12)
        assert later == down  # a group that is added has the rate of A
        scheduler.step()


def test_lora_plus_first_sgd_step() -> None:
    steps = {}
    for ratio in (1.0, 4.0):
        model = adapted().double()
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "lora_B" in n:
                    p.normal_(generator=torch.Generator().manual_seed(0))
        before = trained(model)
        train(model, torch.optim.SGD(LoraPlus.groups(model, 0.01, ratio=ratio)), range(1))
        steps[ratio] = {n: p - before[n] for n, p in trained(model).items()}
    for n, moved in steps[1.0].items():
        torch.testing.assert_close(steps[4.0][n], (4 if "lora_B" in n else 1) * moved, rtol=1e-9, atol=1e-14)


def test_lora_fa_freezes_down() -> None:
    model = adapted()
    optimizer = LoraFa(model, lr=0.01)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_A" in n)
    before = trained(model)
    train(model, optimizer, range(3))
    for n, p in trained(model).items():
        assert torch.equal(p, before[n]) == ("lora_A" in n)
    # another A, loaded under its feet, is noticed
    with torch.no_grad():
        for p in optimizer.pairs:
            p.down.normal_()
    twin = adapted()
    twin.load_state_dict(model.state_dict())
    other = LoraFa(twin, lr=0.01)
    other.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(3, 5))
    train(twin, other, range(3, 5))
    assert all(torch.equal(p, trained(twin)[n]) for n, p in trained(model).items())


def test_lora_fa_refuses_an_embedding_that_it_would_not_train() -> None:
    model = adapted(target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(RankfoldError, match=r"embed_tokens: a new adapter of an embedding starts with down = 0"):
        LoraFa(model, lr=0.01)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.lora_embedding_A["default"].normal_()
    assert LoraFa(model, lr=0.01).pairs[0].embedding


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_controller_runs(name: str) -> None:
    """SoRA's gates are plain, and its controller sees the step of every optimiser."""
    model = adapted(SoraConfig(r=4, threshold=0.3, target_modules=TARGETS))
    optimizer = create(name, model, 0.003)
    attached = attach(model, optimizer, total_steps=4)
    train(model, optimizer, range(4))
    assert attached.controllers["default"].step == 4
    assert 0 < sum(attached.ranks()["default"].values()) < 4 * 6
    assert all(torch.isfinite(p).all() for p in trained(model).values())


CHAINS = [ColaConfig(r=4, links=2, target_modules=TARGETS), XgbLoraConfig(r=4, link_steps=2, layers_drawn=2, target_modules=TARGETS)]  # fmt: skip


@pytest.mark.parametrize("config", CHAINS, ids=["cola", "xgblora"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_chain_of_links_runs(name: str, config: Any) -> None:
    """A knot drops the state of a pair; the next link's is its own."""
    model = adapted(copy.deepcopy(config))
    optimizer = create(name, model, 0.003)
    attached = attach(model, optimizer, total_steps=4)
    train(model, optimizer, range(4))
    assert attached.controllers["default"].finished()
    assert {int(entry["step"]) for entry in optimizer.state.values() if "step" in entry} == {2}
    assert all(torch.isfinite(p).all() for p in trained(model).values())


@pytest.mark.parametrize(("cls", "options"), RULES, ids=str)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_model_that_is_cast_later(cls: Any, options: dict[str, Any], steps_before: int) -> None:
    """As accelerate moves a model that has an optimiser already."""
    model = adapted()
    optimizer = cls(model, lr=0.01, **options)
    train(model, optimizer, range(steps_before))
    twin = adapted().double()
    twin.load_state_dict(model.state_dict())
    other = cls(twin, lr=0.01, **options)
    other.load_state_dict(optimizer.state_dict())
    model.double()
    train(model, optimizer, range(2, 4))
    train(twin, other, range(2, 4))
    assert all(p.dtype == torch.float64 for p in trained(model).values())
    for n, p in trained(model).items():
        torch.testing.assert_close(p, trained(twin)[n], rtol=0, atol=1e-9)


def test_replaced_parameters_are_noticed() -> None:
    p = pair()
    optimizer = LoraRite([p])
    give(p, GS)
    optimizer.param_groups[0]["params"][0] = nn.Parameter(A0.clone())
    with pytest.raises(RankfoldError, match="were replaced after it was made"):
        optimizer.step()


@pytest.mark.parametrize(("cls", "options"), [rule for rule in RULES if rule[0] is not LoraFa], ids=str)
@pytest.mark.parametrize("which", ["down", "up"])
def test_a_factor_that_is_frozen_later_does_not_move(cls: Any, options: dict[str, Any], which: str) -> None:
    model = adapted()
    optimizer = cls(model, lr=0.01, **options)
    train(model, optimizer, range(2))
    for p in optimizer.pairs:
        getattr(p, which).requires_grad_(False)
    before = values(optimizer.pairs)
    with pytest.raises(RankfoldError, match=rf"q_proj: {which} was frozen after the optimiser was made"):
        train(model, optimizer, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(values(optimizer.pairs), before, strict=True))
    for p in optimizer.pairs:  # both of them, as `set_adapter` does: nothing to step, and no error
        for factor in (p.down, p.up):
            factor.requires_grad_(False)
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(values(optimizer.pairs), before, strict=True))


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("lora_rite", {"escpe": True}, "LoraRite: option escpe=True is not known; did you mean 'escape'?"),
        ("lora_rite", {"zzz": 1}, "LoraRite: option zzz=1 is not known; there are betas, eps"),
        ("lora_rite", {"betas": (0.9, 1.0)}, "LoraRite: betas=\\(0.9, 1.0\\) must be two values in \\[0, 1\\)"),
        ("lora_rite", {"betas": 0.9}, "betas=0.9 must be"),
        ("lora_rite", {"clip": -1}, "LoraRite: clip=-1 must be a number >= 0"),
        ("lora_rite", {"escape": 1}, "escape=1 must be true or false"),
        ("lora_pro", {"mode": "adam"}, "LoraPro: mode='adam' must be \"full\""),
        ("lora_pro", {"x_mode": "best"}, "x_mode='best' must be"),
        ("lora_pro", {"mode": "sgd", "weight_decay": 0.1}, "LoraPro: weight_decay=0.1 must be 0 in mode=\"sgd\""),
        ("lora_fa", {"eps": float("nan")}, "LoraFa: eps=nan must be"),
        ("lora_fa", {"correct_bias": None}, "correct_bias=None must be true or false"),
        ("lora_plus", {"ratio": 0}, "LoraPlus: ratio=0 must be a number > 0"),
        ("lora_plus", {"loraplus_weight_decay": 0}, "loraplus_weight_decay=0 is not known; did you mean 'weight_decay'"),
        ("riemannian", {"reg": None}, "Riemannian: reg=None must be a number >= 0"),
        ("riemannian", {"base": "adam"}, "base='adam' must be \"adamw\" or \"sgd\""),
        ("riemannian", {"plain_lr": "x"}, "plain_lr='x' must be a number >= 0, or null"),
        ("lora_rit", {}, "optimizer='lora_rit' is not known; did you mean 'lora_rite'?"),
    ],
)  # fmt: skip
def test_wrong_options(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(RankfoldError, match=says):
        create(name, adapted(), 1e-3, **options)


@pytest.mark.parametrize("lr", [-1.0, float("nan"), None, "1e-3", True])
def test_wrong_learning_rates(lr: Any) -> None:
    for name in OPTIMIZERS:
        with pytest.raises(RankfoldError, match=r"lr=.* must be a number >= 0"):
            create(name, adapted(), lr)


def test_every_option_has_help() -> None:
    for row in OPTIMIZERS.values():
        assert row.cls.__name__.lower() == row.name.replace("_", "")
        for option in row.options():
            assert option.metadata["help"].endswith("."), (row.name, option.name)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_lora_pro_full_decays_the_product(decay: float) -> None:
    p = pair()
    optimizer = LoraPro([p], lr=0.1, weight_decay=decay)
    give(p, torch.zeros_like(GS))
    optimizer.step()
    torch.testing.assert_close(p.up @ p.down, (1 - 0.1 * decay) * B0 @ A0, rtol=0, atol=1e-12)
