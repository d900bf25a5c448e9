"""Chains: golden values, knots, the learning rate, compaction, resuming. What every method promises is in the table's tests."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from rankfold import ColaConfig, DeltaLoraConfig, PlainLoraConfig, RacLoraConfig, XgbLoraConfig, attach
from rankfold.control.attach import KEY, Attached
from rankfold.fold import fold_model
from rankfold.kernel.factors import Factors
from rankfold.kernel.linears import low_rank_linear
from rankfold.methods.chain import Chain
from rankfold.methods.knots import ChainConfig, positions

# A model of two layers --------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def adapted(config: Any, seed: int = 1) -> PeftModel:
    """The toy; its base weights are always the same, the adapter's first values are the seed's."""
    config.target_modules = {"a", "b"}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        base = Toy()
        torch.manual_seed(seed)
        return get_peft_model(base, config).train()  # pyright: ignore[reportArgumentType, reportReturnType]


def adapters(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, Chain)]


def deltas(model: nn.Module) -> list[Tensor]:
    return [a.factors().delta().detach().clone() for a in adapters(model)]


def batch(step: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(rows, 6, generator=g), torch.randn(rows, 5, generator=g)


def loss_at(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return (model(x) - y).square().mean()


def adamw(model: nn.Module, lr: float = 0.05) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range | list[int]) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_at(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def run(config: Any, steps: int, **options: Any) -> tuple[PeftModel, torch.optim.Optimizer, Attached]:
    model = adapted(config)
    optimizer = adamw(model, **options)
    attached = attach(model, optimizer, total_steps=steps)
    train(model, optimizer, range(steps))
    return model, optimizer, attached


CHAINS: dict[str, Callable[[], ChainConfig]] = {
    "cola": lambda: ColaConfig(r=2, links=3),
    "step-down": lambda: ColaConfig(r=3, links=3, link_ranks=[3, 2, 1], rewarm_steps=2, restart_schedule="hold"),
    "right": lambda: RacLoraConfig(r=2, links=4),
    "left": lambda: RacLoraConfig(r=2, links=4, side="left", sketch="orthonormal"),
    "exact": lambda: RacLoraConfig(r=2, solver="exact_gd", side="left"),
}
chains = pytest.mark.parametrize("made", CHAINS.values(), ids=CHAINS)

# Golden values: float64, one 5×4 matrix, s = 2 ------------------------------------------------------------------------------

I, J = torch.arange(5.0, dtype=torch.float64)[:, None], torch.arange(4.0, dtype=torch.float64)
A0 = torch.sin(1 + 4 * I[:2] + J)
B0 = torch.cos(1 + 2 * I + J[:2])
W0 = torch.cos(0.3 * I + 0.9 * J)
T = torch.sin(0.2 + 1.1 * I - 0.6 * J)


def golden(config: ChainConfig, fresh: tuple[Tensor, Tensor], lr: float, links: int, steps: int) -> list[float]:
    """The loss ½‖W − T‖² after each link, every one of which starts at the same factors."""
    config.target_modules = {"0"}
    model = get_peft_model(nn.Sequential(nn.Linear(4, 5, bias=False)).double(), config)  # pyright: ignore[reportArgumentType]
    model.base_model.model[0].base_layer.weight.data = W0.clone()  # pyright: ignore
    model.double()
    (adapter,) = adapters(model)
    adapter.fresh = lambda generator: fresh
    adapter.start(0)

    def loss() -> Tensor:
        return 0.5 * (model(torch.eye(4, dtype=torch.float64)).T - T).square().sum()

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    attach(model, optimizer, total_steps=links * steps)
    found = []
    for step in range(links * steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        if (step + 1) % steps == 0:
            found.append(loss().item())
    return found


ZERO_A, ZERO_B = torch.zeros_like(A0), torch.zeros_like(B0)


def test_golden_cola() -> None:
    found = golden(ColaConfig(r=2, lora_alpha=4, links=3), (A0, ZERO_B), 0.02, links=3, steps=2)
    assert found == pytest.approx([5.6963064993, 4.3142522657, 3.6022545449], abs=1e-9)


@pytest.mark.parametrize(
    ("side", "fresh", "wanted"),
    [
        ("right", (A0, ZERO_B), [5.7600607920, 4.3704385987, 3.6540642958]),
        ("left", (ZERO_A, B0), [9.3925659523, 9.1267798879, 8.9639374853]),
    ],
)
def test_golden_rac_lora(side: Any, fresh: tuple[Tensor, Tensor], wanted: list[float]) -> None:
    found = golden(RacLoraConfig(r=2, lora_alpha=4, links=3, side=side), fresh, 0.02, links=3, steps=2)
    assert found == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(
    ("side", "fresh", "wanted"),
    [
        ("left", (ZERO_A, B0), [8.9465695749, 8.7070746743, 8.6472009492]),
        ("right", (A0, ZERO_B), [3.0251479604, 1.3052976562, 0.8753350802]),
    ],
)
def test_golden_exact_gd(side: Any, fresh: tuple[Tensor, Tensor], wanted: list[float]) -> None:
    config = RacLoraConfig(r=2, lora_alpha=4, solver="exact_gd", side=side)
    assert golden(config, fresh, 0.5, links=3, steps=1) == pytest.approx(wanted, abs=1e-9)


def test_a_chain_of_one_link_is_lora_bit_for_bit() -> None:
    cola, *_ = run(ColaConfig(r=2, links=1), 5)
    lora, *_ = run(PlainLoraConfig(r=2), 5)
    for one, other in zip(cola.parameters(), lora.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "config",
    [ColaConfig(r=2, links=2), ColaConfig(r=2, preset="beyond_lora"), XgbLoraConfig(r=2), DeltaLoraConfig(r=2)],
)
def test_an_embedding_starts_as_loras_at_every_link(config: Any) -> None:
    """Only one of its inputs is not zero: a Kaiming `down` would be 1/√rows, and everything learned as much smaller."""

    def made(config: Any) -> Any:
        config.target_modules = {"0"}
        torch.manual_seed(3)
        model = get_peft_model(nn.Sequential(nn.Embedding(400, 5), nn.Linear(5, 4)), config)
        return model, model.base_model.model[0].adapters(["default"])[0]  # pyright: ignore

    (_, lora), (model, adapter) = made(PlainLoraConfig(r=2)), made(config)
    assert not adapter.down.any()
    assert torch.equal(adapter.up, lora.up)
    if isinstance(config, ColaConfig):
        optimizer = adamw(model)
        attach(model, optimizer, total_steps=2 * (config.links or 0))
        ids = torch.arange(6)
        for _ in range(2):
            optimizer.zero_grad()
            model(ids).square().sum().backward()
            optimizer.step()
        assert adapter.frozen_rank == 2
        assert not adapter.down.any()
        assert 0.2 < adapter.up.std() < 3


# The knot -------------------------------------------------------------------------------------------------------------


@chains
def test_a_knot_changes_nothing_but_the_live_pair(made: Callable[[], ChainConfig]) -> None:
    config = made()
    model = adapted(config)
    head = nn.Parameter(torch.zeros(5))
    optimizer = torch.optim.AdamW([{"params": list(model.parameters())}, {"params": [head]}], lr=0.05)
    attach(model, optimizer, total_steps=12)
    knots = list(positions(config, 12))
    for step in range(12):
        optimizer.zero_grad()
        (loss_at(model, step) + (head - 1).square().sum()).backward()
        optimizer.step()
        pairs = [p for a in adapters(model) for p in a.parameters()]
        if step + 1 in knots:
            assert not any(p in optimizer.state for p in pairs)  # moments and step counts
        elif config.method != "rac_lora" or config.solver == "optimizer":  # pyright: ignore[reportAttributeAccessIssue]
            assert all(
                optimizer.state[p]["step"] == step + 1 - max([k for k in knots if k <= step], default=0) for p in pairs
            )
        assert optimizer.state[head]["step"] == step + 1


@chains
def test_the_function_is_the_same_on_both_sides_of_a_knot(made: Callable[[], ChainConfig]) -> None:
    config = made()
    model = adapted(config)
    optimizer = adamw(model)
    controller = attach(model, optimizer, total_steps=12).controllers["default"]
    before: list[Tensor] = []
    tie = controller.tie  # pyright: ignore[reportAttributeAccessIssue]

    def watched(optimizer: torch.optim.Optimizer) -> None:
        before[:] = [
            *deltas(model),
            *[a.down.clone() for a in adapters(model)],
            *[a.up.clone() for a in adapters(model)],
        ]
        tie(optimizer)
        now, (a, b) = deltas(model), adapters(model)
        torch.testing.assert_close(now, before[:2], rtol=1e-5, atol=1e-6)
        for adapter, down, up in ((a, before[2], before[4]), (b, before[3], before[5])):
            assert not adapter.down.any() or not adapter.up.any()
            assert adapter.live().delta().count_nonzero() == 0
            assert not torch.equal(adapter.down, down)
            assert not torch.equal(adapter.up, up)
        assert not torch.equal(a.down[:1, :5], b.down[:1, :5]) or not torch.equal(a.up[:5, :1], b.up[:5, :1])

    controller.tie = watched  # pyright: ignore[reportAttributeAccessIssue]
    train(model, optimizer, range(12))
    assert before


def test_frozen_factors_are_drawn_anew_and_never_trained() -> None:
    for side, name in (("right", "down"), ("left", "up")):
        model = adapted(RacLoraConfig(r=2, links=4, side=side))  # pyright: ignore[reportArgumentType]
        optimizer = adamw(model)
        attach(model, optimizer, total_steps=8)
        seen = []
        for step in range(8):
            (adapter, _) = adapters(model)
            sketch = getattr(adapter, name)
            assert not sketch.requires_grad
            assert [n for n, _ in adapter.named_parameters()] == [{"down": "up", "up": "down"}[name]]
            if step % 2:
                assert torch.equal(sketch, seen[-1])
            elif seen:
                assert not torch.equal(sketch, seen[-1])
            seen.append(sketch.clone())
            train(model, optimizer, [step])
        # four links of rank 2: as many directions as there is room for
        assert torch.linalg.matrix_rank(adapters(model)[0].factors().delta()) == 6


def test_links_are_the_same_whatever_the_first_values_were() -> None:
    """Every process draws them alike, and so does a run that is resumed."""
    ends = [run(RacLoraConfig(r=2, links=3), 6)[0] for _ in range(2)]
    other = adapted(RacLoraConfig(r=2, links=3), seed=5)
    optimizer = adamw(other)
    attach(other, optimizer, total_steps=6)
    train(other, optimizer, range(6))
    for one, two, three in zip(*map(adapters, (*ends, other)), strict=True):
        assert torch.equal(one.links_down, two.links_down)
        assert torch.equal(one.down, three.down)
        assert not torch.equal(one.links_down, three.links_down)  # the first link's, which torch's own generator drew
    seeded = run(RacLoraConfig(r=2, links=3, seed=1), 6)[0]
    assert not torch.equal(adapters(seeded)[0].down, adapters(other)[0].down)


def test_gradient_accumulation_ties_no_knot() -> None:
    model = adapted(ColaConfig(r=2, link_steps=2))
    optimizer = adamw(model)
    attached = attach(model, optimizer, total_steps=4)
    for micro in range(12):
        (loss_at(model, micro) / 4).backward()
        if micro % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    assert [link["step"] for link in attached.controllers["default"].state["chain"]["links"]] == [2]


def test_ranks_step_down() -> None:
    model, _, attached = run(CHAINS["step-down"](), 9)
    links = attached.controllers["default"].state["chain"]["links"]
    assert [link["rank"] for link in links] == [6, 4]  # of two modules
    for adapter in adapters(model):
        alive = adapter.down.any(dim=1) & adapter.up.any(dim=0)
        assert alive.tolist() == [True, False, False]
        assert adapter.scaling == 8 / 3  # α/r of the first link, for all of them


def test_a_wider_last_link_is_kept_whole_by_a_second_run() -> None:
    model, *_ = run(ColaConfig(r=4, links=2, link_ranks=[1, 4]), 6)
    model.peft_config["default"].schedule = None
    before = deltas(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    attach(model, optimizer, total_steps=4)
    train(model, optimizer, range(4))
    for a, b in zip(before, deltas(model), strict=True):
        torch.testing.assert_close(a, b)


def test_links_are_recorded() -> None:
    model, _, attached = run(ColaConfig(r=2, links=2, links_limit=100), 6)
    schedule = model.peft_config["default"].schedule
    assert schedule is not None
    assert schedule["finished"]
    (link,) = schedule["links"]
    frozen = [Factors(a.links_down, a.links_up, scale=a.scaling).delta().norm() for a in adapters(model)]
    assert link == {"step": 3, "rank": 4, "norm": pytest.approx(torch.stack(frozen).norm().item(), rel=1e-5)}
    assert attached.ranks() == {"default": {"a": 4, "b": 4}}


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@chains
def test_a_step_that_the_scaler_skips_ties_no_knot(made: Callable[[], ChainConfig], fused: bool) -> None:
    """Scaled by a power of two, and with an overflow before step 3: the same bits as without a scaler."""

    def scaled(overflow: bool) -> PeftModel:
        model = adapted(made())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, fused=fused)
        attached = attach(model, optimizer, total_steps=9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        for step in range(9):
            for bad in (True, False) if overflow and step == 3 else (False,):
                optimizer.zero_grad()
                loss: Any = scaler.scale(loss_at(model, step) * (float("inf") if bad else 1.0))
                loss.backward()
                scaler.step(optimizer)
                scaler.update()
        assert attached.controllers["default"].step == 9
        return model

    plain = adapted(made())
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.05, fused=fused)
    attach(plain, optimizer, total_steps=9)
    train(plain, optimizer, range(9))
    for model in (scaled(False), scaled(True)):
        assert all(torch.equal(t, plain.state_dict()[k]) for k, t in model.state_dict().items())


# How long a link is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "total", "wanted"),
    [
        ({}, 9, [3, 6]),
        ({"links": 3}, 10, [3, 7]),
        ({"links": 1}, None, []),
        ({"links": 4}, 4, [1, 2, 3]),
        ({"link_steps": 4}, 12, [4, 8]),
        ({"link_steps": 4}, 4, []),
        ({"link_shares": [0.6, 0.4]}, 10, [6]),
        ({"link_shares": [0.5, 0.25, 0.25]}, 8, [4, 6]),
    ],
)
def test_positions(fields: dict[str, Any], total: int | None, wanted: list[int]) -> None:
    assert list(positions(ColaConfig(**fields), total)) == wanted


@pytest.mark.parametrize(
    ("config", "total", "named"),
    [
        (ColaConfig(links=5), 4, "links=5 leaves a link without a step in a run of 4 steps"),
        (ColaConfig(link_shares=[0.95, 0.05]), 4, "link_shares=.* leaves a link without a step"),
        (ColaConfig(link_steps=5), 4, "link_steps=5 is longer than the run of 4 steps"),
        (RacLoraConfig(), None, "RacLoraConfig: 10 links need the length of the run"),
    ],
)
def test_a_chain_that_does_not_fit_the_run(config: ChainConfig, total: int | None, named: str) -> None:
    model = adapted(copy.deepcopy(config))
    with pytest.raises(ValueError, match=named):
        attach(model, adamw(model), total_steps=total)


def test_without_an_end_links_follow_one_another() -> None:
    model = adapted(ColaConfig(r=2, link_steps=2))
    optimizer = adamw(model)
    attached = attach(model, optimizer)
    train(model, optimizer, range(5))
    assert [link["step"] for link in attached.controllers["default"].state["chain"]["links"]] == [2, 4]


def test_orthonormal_sketches_need_room() -> None:
    base = Toy()
    with pytest.raises(ValueError, match=r"sketch='orthonormal' finds no 7 .* of 6 entries at a"):
        get_peft_model(base, RacLoraConfig(r=7, sketch="orthonormal", target_modules=["a", "b"]))  # pyright: ignore[reportArgumentType]
    assert not any("lowrank" in n for n, _ in base.named_modules())
    for adapter in adapters(adapted(RacLoraConfig(r=3, sketch="orthonormal"))):
        torch.testing.assert_close(adapter.down @ adapter.down.T, torch.eye(3))


# The learning rate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "factors"),
    [
        ({}, [1.0] * 6),
        ({"rewarm_steps": 2}, [1, 1, 1, 1 / 3, 2 / 3, 1]),
        ({"restart_schedule": "linear"}, [1, 2 / 3, 1 / 3, 1, 2 / 3, 1 / 3]),
        ({"restart_schedule": "cosine"}, [1, 0.75, 0.25, 1, 0.75, 0.25]),
    ],
)
def test_learning_rate(fields: dict[str, Any], factors: list[float]) -> None:
    """What the optimiser steps with, and that the scheduler's own rates stay as they are."""
    model = adapted(ColaConfig(r=2, links=2, **fields))
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)  # computes each rate from the one before
    attach(model, optimizer, total_steps=6)
    used: list[float] = []
    optimizer.register_step_pre_hook(lambda opt, *_: used.append(opt.param_groups[0]["lr"]))
    for step in range(6):
        train(model, optimizer, [step])
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.9**step)
        scheduler.step()
    assert used == pytest.approx([0.05 * 0.9**step * factor for step, factor in enumerate(factors)])


def test_learning_rate_held_as_independent_code_does() -> None:
    model = adapted(ColaConfig(r=2, links=3, preset="beyond_lora"))
    assert 0 < adapters(model)[0].down.abs().max() < 0.08  # LoRA's reach 0.41
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 6)
    attach(model, optimizer, total_steps=6)
    used: list[float] = []
    optimizer.register_step_pre_hook(lambda opt, *_: used.append(opt.param_groups[0]["lr"]))
    for step in range(6):
        train(model, optimizer, [step])
        scheduler.step()
    assert used == pytest.approx([0.05 * f for f in (1, 5 / 6, 5 / 6, 5 / 6, 5 / 6, 5 / 6)])


# Re-factoring -----------------------------------------------------------------------------------------------------------


def test_links_are_compacted_exactly() -> None:
    with_limit, *_ = run(ColaConfig(r=2, link_steps=1, links_limit=3), 8)
    without, *_ = run(ColaConfig(r=2, link_steps=1, links_limit=100), 8)
    torch.testing.assert_close(deltas(with_limit), deltas(without), rtol=1e-4, atol=1e-5)
    assert [a.frozen_rank for a in adapters(without)] == [14, 14]
    # 6×8 and 8×5 matrices: full rank, and what has come since
    assert all(a.frozen_rank <= min(a.site.in_features, a.site.out_features) + 3 for a in adapters(with_limit))
    assert 0 < with_limit.peft_config["default"].schedule["error"] < 1e-6  # pyright: ignore[reportOptionalSubscript]


def test_links_are_compacted_where_their_rank_passes_half_of_full_rank() -> None:
    """By default: 6×8 and 8×5 matrices, so above 3 and above 2; and again one limit later. Nothing is lost but rounding."""
    model = adapted(ColaConfig(r=1, link_steps=1))
    controller: Any = attach(model, adamw(model)).controllers["default"]
    torch.manual_seed(0)
    for adapter, wanted in zip(adapters(model), ([4], [3, 5]), strict=True):
        compacted, exact = [], torch.zeros(adapter.site.out_features, adapter.site.in_features)
        for link in range(1, 6):
            done = Factors(torch.randn(1, adapter.site.in_features), torch.randn(adapter.site.out_features, 1))
            exact += done.delta()
            controller.freeze(adapter, done)
            assert adapter.frozen_rank == link
            if not torch.equal(adapter.links_up[:, -1:], done.up):  # not the link that was added
                compacted.append(link)
            torch.testing.assert_close(adapter.links_up @ adapter.links_down, exact, rtol=1e-5, atol=1e-5)
        assert compacted == wanted
    assert 0 < controller.chain["error"] < 1e-6


def test_no_update_is_lost_to_a_base_in_half_precision() -> None:
    """200 links of which each is below the rounding of the weight: merged one after another, as published, most of them are gone."""
    layer = nn.Linear(64, 64, bias=False).bfloat16()
    nn.init.normal_(layer.weight, std=0.02)
    model: Any = get_peft_model(
        nn.Sequential(layer), ColaConfig(r=1, lora_alpha=1, target_modules=["0"], links_limit=300)
    )  # pyright: ignore[reportArgumentType]
    (adapter,) = adapters(model)
    one_by_one, exact = layer.weight.detach().clone(), torch.zeros(64, 64, dtype=torch.float64)
    for _ in range(200):
        link = Factors(torch.randn(1, 64) / 64, 8e-4 * torch.randn(64, 1))
        adapter.add_link(link)
        exact += link.up.double() @ link.down.double()
        one_by_one = (one_by_one.float() + link.delta()).to(torch.bfloat16)
    adapter.down.data.zero_()

    def error(found: Tensor) -> float:
        return float((found.detach().double() - exact).norm() / exact.norm())

    assert error(adapter.factors().delta()) < 1e-6
    base = layer.weight.detach().double()
    lost = error(one_by_one.double() - base)
    assert lost > 0.5
    model.base_model.merge_adapter()
    assert error(model.base_model.model[0].base_layer.weight.double() - base) < 0.25 * lost  # one rounding in all
    model.base_model.unmerge_adapter()
    assert torch.equal(model.base_model.model[0].base_layer.weight.double(), base)


def test_the_error_of_a_re_factoring_is_the_users_and_stated() -> None:
    model, *_ = run(ColaConfig(r=2, link_steps=1, links_limit=2, links_error=0.3), 8)
    error = model.peft_config["default"].schedule["error"]  # pyright: ignore[reportOptionalSubscript]
    assert 0.01 < error <= 0.3
    assert all(a.frozen_rank < 6 for a in adapters(model))


def test_links_of_hundreds_of_knots_stay_small() -> None:
    model, *_ = run(ColaConfig(r=1, link_steps=1), 200, lr=0.005)
    assert all(a.frozen_rank <= 1.5 * min(a.site.in_features, a.site.out_features) + 1 for a in adapters(model))


# Saving and resuming ------------------------------------------------------------------------------------------------------


def saved(model: PeftModel, optimizer: torch.optim.Optimizer) -> bytes:
    buffer = io.BytesIO()
    torch.save({"adapter": get_peft_model_state_dict(model), "optimizer": optimizer.state_dict()}, buffer)
    return buffer.getvalue()


@chains
def test_resumes_bit_for_bit_from_every_step(made: Callable[[], ChainConfig]) -> None:
    """In the middle of a link, just before a knot and just after it."""
    model = adapted(made())
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=9)
    files = [saved(model, optimizer)]
    for step in range(9):
        train(model, optimizer, [step])
        files.append(saved(model, optimizer))
    wanted = model.state_dict()
    for step in range(1, 9):
        file = torch.load(io.BytesIO(files[step]), weights_only=True)
        again = adapted(made(), seed=99)
        set_peft_model_state_dict(again, file["adapter"])
        optimizer = adamw(again)
        optimizer.load_state_dict(file["optimizer"])
        attach(again, optimizer, total_steps=9)
        train(again, optimizer, range(step, 9))
        assert again.state_dict().keys() == wanted.keys()
        assert all(torch.equal(t, wanted[k]) for k, t in again.state_dict().items()), step


def test_a_checkpoint_of_another_chain_is_refused() -> None:
    model, optimizer, _ = run(ColaConfig(r=2, links=3), 9)
    other = adapted(ColaConfig(r=2, links=2))
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    fresh = adamw(other)
    fresh.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"another chain, which tied its knots after steps \[3, 6\].* after \[4\]"):
        attach(other, fresh, total_steps=9)


def test_links_and_schedule_of_different_checkpoints_are_refused() -> None:
    _, optimizer, _ = run(ColaConfig(r=2, links=3), 9)
    other = adapted(ColaConfig(r=2, links=3))  # whose adapter was not loaded
    fresh = adamw(other)
    fresh.load_state_dict(optimizer.state_dict())
    attach(other, fresh, total_steps=9)
    with pytest.raises(ValueError, match=r"links have 0 components, .*load both from the same checkpoint"):
        train(other, fresh, [8])


def test_a_used_config_begins_without_links(tmp_path: Any) -> None:
    model, *_ = run(ColaConfig(r=2, links=2), 4)
    model.save_pretrained(tmp_path)
    config = copy.deepcopy(model.peft_config["default"])
    assert config.grown == {"a": 2, "b": 2}
    config.schedule, config.inference_mode = None, False
    again = adapted(config)
    optimizer = adamw(again)
    attach(again, optimizer, total_steps=2)
    assert [a.frozen_rank for a in adapters(again)] == [0, 0]
    assert not any(delta.any() for delta in deltas(again))


def test_a_link_that_learned_nothing_is_kept() -> None:
    """In a warm-up from 0 the first link may be zero; a resumed run must not take it for room that was never used."""
    model = adapted(ColaConfig(r=2, link_steps=1, links_limit=100))
    optimizer = adamw(model, lr=0.0)
    attach(model, optimizer, total_steps=3)
    train(model, optimizer, [0])
    again = adapted(ColaConfig(r=2, link_steps=1, links_limit=100), seed=9)
    set_peft_model_state_dict(again, get_peft_model_state_dict(model))
    fresh = adamw(again)
    fresh.load_state_dict(optimizer.state_dict())
    attach(again, fresh, total_steps=3)
    train(again, fresh, [1])
    assert [a.frozen_rank for a in adapters(again)] == [4, 4]


def test_a_chain_goes_on_behind_another(tmp_path: Any) -> None:
    """A second run from the adapter of the first draws other values, and keeps the first one's links."""
    model, *_ = run(RacLoraConfig(r=1, links=2), 4)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Toy(), tmp_path, is_trainable=True)
    again.peft_config["default"].schedule = None
    optimizer = adamw(again)
    attach(again, optimizer, total_steps=4)
    train(again, optimizer, range(4))
    for first, both in zip(adapters(model), adapters(again), strict=True):
        assert both.frozen_rank == 2
        assert torch.equal(both.links_down[:1], first.links_down)
        assert not torch.equal(both.down, first.down)


def test_state_lives_in_the_optimiser() -> None:
    _, optimizer, attached = run(ColaConfig(r=2, links=2), 4)
    assert optimizer.param_groups[0][KEY]["default"] is attached.controllers["default"].state


# The kernel -------------------------------------------------------------------------------------------------------------


def test_frozen_links_keep_nothing_for_the_backward() -> None:
    """Neither the input, where every `down` is frozen, nor the product with frozen links."""
    config = RacLoraConfig(r=2, links=1, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(30, 40)), config)  # pyright: ignore[reportArgumentType]
    (adapter,) = adapters(model)
    adapter.add_link(Factors(torch.randn(7, 30), torch.randn(40, 7)))
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        model(torch.randn(11, 30)).sum().backward()
    assert [shape for shape in shapes if shape[0] == 11] == [(11, 2)]


def test_a_term_of_frozen_factors_leads_back_to_the_input() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True), torch.randn(5, 6, dtype=torch.float64)
    pairs = [Factors(torch.randn(2, 6).double(), torch.randn(5, 2).double(), scale=s) for s in (0.5, 2.0)]
    adapter = Chain(ColaConfig(r=2), site := adapters(adapted(ColaConfig()))[0].site)
    assert site.name == "a"
    terms = [adapter.term()._replace(blocks=(f,)) for f in pairs]
    wanted = x @ (w + sum(f.delta() for f in pairs)).T
    found = low_rank_linear(x, w, None, terms)
    torch.testing.assert_close(found, wanted)
    g = torch.randn_like(found)
    (one,) = torch.autograd.grad(found, x, g)
    (two,) = torch.autograd.grad(wanted, x, g)
    torch.testing.assert_close(one, two)


@pytest.mark.slow
def test_compiled_layers_follow_a_knot() -> None:
    torch.compiler.reset()
    model = adapted(ColaConfig(r=2, links=3))
    layer = model.base_model.model.a  # pyright: ignore
    compiled = torch.compile(layer, backend="aot_eager")
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=6)
    for step in range(6):
        train(model, optimizer, [step])
        torch.testing.assert_close(compiled(batch(step)[0]), layer(batch(step)[0]))


# Folding ----------------------------------------------------------------------------------------------------------------


def test_dropout_does_not_reach_finished_links() -> None:
    model = adapted(ColaConfig(r=2, lora_dropout=0.9))
    before = [adapter.terms() for adapter in adapters(model)]
    assert [[t.dropout for t in terms] for terms in before] == [[0.9], [0.9]]
    for adapter in adapters(model):
        adapter.add_link(Factors(torch.randn(2, adapter.site.in_features), torch.randn(adapter.site.out_features, 2)))
    assert [[t.dropout for t in adapter.terms()] for adapter in adapters(model)] == [[0.9, 0.0], [0.9, 0.0]]
    assert torch.equal(model(batch(0)[0]), model(batch(0)[0]))  # the live pair is zero


def test_dropout_does_not_reach_finished_links_of_a_convolution() -> None:
    config = ColaConfig(r=2, lora_dropout=0.9, target_modules=["0"])
    model: Any = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3)), config).train()  # pyright: ignore[reportArgumentType]
    (adapter,) = adapters(model)
    adapter.add_link(Factors(torch.randn(2, adapter.site.in_features), torch.randn(adapter.site.out_features, 2)))
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(model(x), model(x))


def test_fold_of_a_chain_in_stock_peft(tmp_path: Any) -> None:
    from models import LLAMA

    base = LLAMA.build()
    base.save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    model = get_peft_model(LLAMA.build(), ColaConfig(r=2, links=3, target_modules=["q_proj", "down_proj"]))  # pyright: ignore[reportArgumentType]
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    optimizer = adamw(model, 0.01)
    attach(model, optimizer, total_steps=6)
    for _ in range(6):
        optimizer.zero_grad()
        LLAMA.loss(model).backward()
        optimizer.step()
    report = fold_model(model.eval(), tmp_path / "out", pad="none")
    assert report.needed_rank == 6
    folded = PeftModel.from_pretrained(LLAMA.build(), str(tmp_path / "out")).eval()  # pyright: ignore[reportArgumentType]
    assert type(folded.peft_config["default"]).__name__ == "LoraConfig"
    torch.testing.assert_close(LLAMA.out(folded), LLAMA.out(model), rtol=1e-4, atol=1e-5)


# Optimisers of our own ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LoraPlus", "LoraPro", "LoraRite", "Riemannian", "LoraFa"])
def test_pair_optimisers_forget_the_pair_at_a_knot(name: str) -> None:
    import rankfold.optim

    model = adapted(ColaConfig(r=2, links=2))
    optimizer = getattr(rankfold.optim, name)(model, lr=0.01)
    attach(model, optimizer, total_steps=6)
    losses = train(model, optimizer, range(6))
    assert all(loss < 10 for loss in losses)
    assert [a.frozen_rank for a in adapters(model)] == [2, 2]
    for adapter in adapters(model):
        steps = optimizer.state[adapter.up].get("step")
        assert steps is None or int(steps) == 3
