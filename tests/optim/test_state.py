"""Resuming: bit-identical to a run that was not interrupted; states of others are refused in one sentence."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from small_llama import TARGETS, adapted, train, trained
from torch import nn

from rankfold import SoraConfig
from rankfold.errors import RankfoldError
from rankfold.optim import LoraFa, LoraPlus, LoraPro, LoraRite, Riemannian
from rankfold.optim.create import create
from rankfold.optim.registry import OPTIMIZERS

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("lora_plus", {}), ("lora_pro", {}), ("lora_pro", {"mode": "efficient"}), ("lora_pro", {"mode": "sgd"}), ("lora_rite", {}),
    ("lora_rite", {"escape": False, "balance": True, "weight_decay": 0.1}), ("lora_fa", {"weight_decay": 0.1}), ("riemannian", {}),
    ("riemannian", {"base": "sgd"}),
]  # fmt: skip


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Through a file, as Trainer has it."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def model_with_head(dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    model = adapted(**kwargs) if kwargs else adapted(modules_to_save=["lm_head"], rank_pattern={"v_proj": 2})
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(dtype)
    return model if dtype == torch.float32 else model.to(dtype)


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resume_is_exact(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    straight = model_with_head(dtype)
    train(straight, create(name, straight, 0.01, **options), range(6))

    first = model_with_head(dtype)
    optimizer = create(name, first, 0.01, **options)
    train(first, optimizer, range(3))
    state = saved(optimizer)
    second = model_with_head(dtype)
    second.load_state_dict(first.state_dict())
    resumed = create(name, second, 0.01, **options)
    resumed.load_state_dict(state)
    train(second, resumed, range(3, 6))

    assert any(not torch.equal(v, trained(model_with_head(dtype))[n]) for n, v in trained(straight).items())
    for n, value in trained(straight).items():
        assert torch.isfinite(value).all()
        assert torch.equal(trained(second)[n], value), n


def test_states_of_half_precision_factors_are_wide() -> None:
    model = model_with_head(torch.bfloat16)
    optimizer = LoraRite(model, lr=0.01)
    train(model, optimizer, range(1))
    for _ in range(2):
        kept = optimizer.state[optimizer.pairs[0].up]
        assert {v.dtype for v in kept.values() if isinstance(v, torch.Tensor)} == {torch.float32}
        optimizer.load_state_dict(saved(optimizer))


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_a_state_saved_in_another_type_goes_on(
    name: str, options: dict[str, Any], types: tuple[torch.dtype, ...]
) -> None:
    before, now = (adapted(modules_to_save=["lm_head"]).to(dtype) for dtype in types)
    optimizer = create(name, before, 0.01, **options)
    train(before, optimizer, range(2))
    resumed = create(name, now, 0.01, **options)
    resumed.load_state_dict(saved(optimizer))
    for group in resumed.param_groups:
        for p in group["params"] if group["kind"] != "pairs" else ():  # as torch's AdamW, which asks for one type
            assert {t.dtype for k, t in resumed.state[p].items() if k != "step"} == {types[1]}
    train(now, resumed, range(2, 4))
    assert all(torch.isfinite(value).all() for value in trained(now).values())


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_copies_go_on_alike(name: str, options: dict[str, Any]) -> None:
    """deepcopy and pickle of model and optimiser together; the shared memory of a stack must not be."""
    model = model_with_head()
    optimizer = create(name, model, 0.01, **options)
    train(model, optimizer, range(2))
    for twin, theirs in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        before = trained(model)
        train(twin, theirs, range(2, 4))
        assert all(torch.equal(v, before[n]) for n, v in trained(model).items())
        third = copy.deepcopy((model, optimizer))
        train(*third, range(2, 4))
        for n, value in trained(third[0]).items():
            assert torch.equal(trained(twin)[n], value), n


def foreign(make: Any) -> dict[str, Any]:
    model = make()
    optimizer = LoraRite(model, lr=0.01)
    train(model, optimizer, range(1))
    return saved(optimizer)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: adapted(r=2), "a pair is model.layers.0.self_attn.q_proj \\(16×16, rank 2\\), here it is .* rank 4\\)"),
        (lambda: adapted(target_modules=["k_proj"]), "a pair is model.layers.0.self_attn.k_proj"),
        (lambda: adapted(target_modules=TARGETS[:1]), "a pair is model.layers.1.self_attn.q_proj .*, here it is .*v_proj"),
        (lambda: adapted(modules_to_save=["lm_head"]), "it has 2 parameter groups, here are 1"),
    ],
)  # fmt: skip
def test_another_models_state(make: Any, says: str) -> None:
    model = adapted()
    optimizer = LoraRite(model, lr=0.01)
    train(model, optimizer, range(1))
    before = saved(optimizer)
    with pytest.raises(RankfoldError, match=f"LoraRite: the state to load .*{says}.*resume with"):
        optimizer.load_state_dict(foreign(make))
    after = saved(optimizer)
    assert str(before) == str(after)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda m: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad]),
            "kind is None, here it is 'pairs'",
        ),
        (lambda m: LoraRite(m, escape=False), "of one parameter it keeps"),
        (LoraPro, "of one parameter it keeps"),
        (lambda m: LoraPlus(m), "parameter groups"),
    ],
)
def test_another_optimisers_state(make: Any, says: str) -> None:
    model = adapted()
    other = make(model)
    train(model, other, range(1))
    with pytest.raises(RankfoldError, match=says):
        LoraRite(model).load_state_dict(saved(other))


def test_another_mode_and_no_state() -> None:
    model = adapted()
    with pytest.raises(RankfoldError, match="its mode is 'sgd', here it is 'full'"):
        LoraPro(model).load_state_dict(LoraPro(model, mode="sgd").state_dict())
    with pytest.raises(RankfoldError, match="no param_groups and state"):
        LoraRite(model).load_state_dict({"model": {}})
    plus = LoraPlus(adapted(r=2))
    for p in plus.param_groups[0]["params"] + plus.param_groups[1]["params"]:
        p.grad = torch.ones_like(p)
    plus.step()
    with pytest.raises(RankfoldError, match="LoraPlus: the state to load is that of another model, rank"):
        LoraPlus(model).load_state_dict(plus.state_dict())


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_state_bytes(name: str, options: dict[str, Any]) -> None:
    """The row's formula is what lies in memory, each storage once; and the table of the specification."""
    model = adapted(rank_pattern={"v_proj": 2})
    optimizer = create(name, model, 0.01, **options)
    shapes = [p.shape for p in LoraRite(adapted(rank_pattern={"v_proj": 2})).pairs]
    train(model, optimizer, range(2))
    storages = {}
    for entry in optimizer.state.values():
        for key, t in entry.items():
            if isinstance(t, torch.Tensor) and key != "step":
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    assert sum(storages.values()) == OPTIMIZERS[name].state_bytes(shapes, **options)


def test_state_bytes_of_the_specification() -> None:
    m, n, r = 20, 30, 4
    expected = {
        ("lora_plus", ""): 2 * r * (m + n), ("lora_pro", "full"): 2 * m * n, ("lora_pro", "efficient"): 2 * r * (m + n),
        ("lora_pro", "sgd"): 0, ("lora_rite", ""): 2 * r * (m + n) + 2 * r * r + 2, ("lora_fa", ""): 2 * r * m,
        ("riemannian", ""): 2 * r * (m + n),
    }  # fmt: skip
    for (name, mode), elements in expected.items():
        assert OPTIMIZERS[name].state_bytes([(m, n, r)], **({"mode": mode} if mode else {})) == 4 * elements
    assert OPTIMIZERS["lora_fa"].state_bytes([], plain=10) == 80


def test_gated_pairs_resume() -> None:
    def start() -> nn.Module:
        return adapted(SoraConfig(r=4, target_modules=TARGETS, allow_unscheduled=True))

    for cls in (LoraRite, LoraPro, LoraFa, Riemannian):
        model = start()
        optimizer = cls(model, lr=0.01)
        with pytest.warns(UserWarning, match="without its controller"):
            train(model, optimizer, range(2))
        state = saved(optimizer)
        twin = start()
        twin.load_state_dict(model.state_dict())
        again = cls(twin, lr=0.01)
        again.load_state_dict(state)
        train(model, optimizer, range(2, 4))
        with pytest.warns(UserWarning, match="without its controller"):
            train(twin, again, range(2, 4))
        assert all(torch.equal(v, trained(twin)[n]) for n, v in trained(model).items())
