"""CoRA: what its specification promises, and every basis it must refuse."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from models import BERT, GPT2, LLAMA, T5, Arch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from table import adapter_parameters, assert_same, layers, snapshot, stir, stock_lora, weights
from torch import nn

from rankfold import CoraConfig, PlainLoraConfig
from rankfold.errors import RankfoldError
from rankfold.fold import fold_adapter
from rankfold.io.adapters import read_config
from rankfold.methods.cora_subspace import build_subspace, load_subspace

QKV = {
    "bert": ("query", "key", "value"),
    "llama": ("q_proj", "k_proj", "v_proj"),
    "gpt2": ("c_attn",),
    "t5": ("q", "k", "v"),
}
SCOPE = {"llama": "module"}  # grouped-query attention: k and v are smaller than q
RANK = 6

approaches = pytest.mark.parametrize("approach", [1, 2])
archs = pytest.mark.parametrize("arch", [BERT, LLAMA, GPT2, T5], ids=lambda arch: arch.name)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A basis file for each architecture, from two models of it."""
    root, files = tmp_path_factory.mktemp("bases"), {}
    for arch in (BERT, LLAMA, GPT2, T5):
        for seed in range(2):
            torch.manual_seed(seed)
            arch.make().save_pretrained(root / f"{arch.name}{seed}")  # pyright: ignore[reportCallIssue]
        files[arch.name] = root / f"{arch.name}.safetensors"
        build_subspace(
            [root / f"{arch.name}{seed}" for seed in range(2)],
            files[arch.name],
            targets=QKV[arch.name],
            scope=SCOPE.get(arch.name, "layer"),
            rank=RANK,
        )
    return files


@pytest.fixture
def basis(bases: dict[str, Path], tmp_path: Path) -> Path:
    """BERT's, in a place of its own that a test may damage."""
    return Path(shutil.copy(bases["bert"], tmp_path / "qkv.safetensors"))


def adapt(arch: Arch, basis: Path, live: bool = True, dtype: torch.dtype = torch.float32, **kwargs) -> PeftModel:
    options = kwargs.pop("options", {})
    config = CoraConfig(basis=basis, **{"r": 4, "lora_alpha": 6, "task_type": arch.task, **kwargs})
    model = get_peft_model(arch.build(dtype=dtype), config, **options)
    if live:
        stir(model)
    return model.eval()  # pyright: ignore[reportReturnType]


def adapters(model: nn.Module, name: str = "default") -> dict[str, nn.Module]:
    return {n: layer.lowrank_adapters[name] for n, layer in layers(model).items() if name in layer.lowrank_adapters}


def train(model: PeftModel, arch: Arch, steps: int = 4, **options) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **options)
    for step in range(steps):
        arch.loss(model, arch.inputs(seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


# The method -----------------------------------------------------------------------------------------------------------


@archs
@approaches
def test_starts_at_the_base_with_the_basis_as_b(arch: Arch, approach: int, bases: dict[str, Path]) -> None:
    model = adapt(arch, bases[arch.name], live=False, approach=approach)
    assert torch.equal(arch.out(model), arch.out(arch.build()))
    found = load_subspace(bases[arch.name])
    assert set(layers(model)) == {
        n for n, _ in arch.build().named_modules() if n.endswith(tuple("." + t for t in QKV[arch.name]))
    }
    arch.loss(model).backward()
    for adapter in adapters(model).values():
        (factors,) = adapter.blocks()
        assert torch.equal(factors.up, found.basis_for(adapter.site)[:, :4])
        assert factors.scale == 6 / 4
        assert adapter.down.grad.count_nonzero() > 0  # B is not zero: A learns at once
        if approach == 2:
            assert adapter.up.grad.count_nonzero() == 0


@approaches
def test_random_start_is_in_the_subspace(approach: int, bases: dict[str, Path]) -> None:
    model = adapt(BERT, bases["bert"], live=False, approach=approach, init_lora_weights=False)
    found = load_subspace(bases["bert"])
    for adapter in adapters(model).values():
        delta, b = adapter.factors().detach().delta(), found.basis_for(adapter.site)[:, :4]
        assert delta.count_nonzero() > 0
        torch.testing.assert_close(b @ (b.T @ delta), delta)


@archs
def test_parameter_count(arch: Arch, bases: dict[str, Path]) -> None:
    plain = PlainLoraConfig(r=4, target_modules=list(QKV[arch.name]))
    lora = sum(p.numel() for _, p in adapter_parameters(get_peft_model(arch.build(), plain)))
    frozen, trained = (adapt(arch, bases[arch.name], approach=a) for a in (1, 2))
    sites = [a.site for a in adapters(frozen).values()]
    assert (
        sum(p.numel() for _, p in adapter_parameters(trained))
        == lora
        == sum(4 * (s.in_features + s.out_features) for s in sites)
    )
    assert sum(p.numel() for _, p in adapter_parameters(frozen)) == sum(4 * s.in_features for s in sites)
    if arch is BERT:  # in = out
        assert 2 * sum(p.numel() for _, p in adapter_parameters(frozen)) == lora


def test_b_is_shared_in_one_storage_or_copied(bases: dict[str, Path]) -> None:
    shared, own = (adapt(BERT, bases["bert"], approach=a) for a in (1, 2))
    tensors = {n: a.blocks()[0].up for n, a in adapters(shared).items()}
    assert len({t.data_ptr() for t in tensors.values()}) == 3 < len(tensors) == 9
    assert sum("lowrank" in n for n, _ in shared.named_buffers()) == 3
    assert len({a.up.data_ptr() for a in adapters(own).values()}) == 9
    assert not any("lowrank" in n for n, _ in own.named_buffers())
    twin = copy.deepcopy(shared)
    assert len({a.blocks()[0].up.data_ptr() for a in adapters(twin).values()}) == 3
    assert torch.equal(BERT.out(twin), BERT.out(shared))


def test_first_sgd_step_is_the_projected_gradient(bases: dict[str, Path]) -> None:
    """ΔW = −η s² B Bᵀ ∇_W L, from A = 0."""
    model = adapt(
        BERT, bases["bert"], live=False, dtype=torch.float64, options={"autocast_adapter_dtype": False}
    ).double()
    for layer in layers(model).values():
        layer.get_base_layer().weight.requires_grad_(True)
    BERT.loss(model).backward()
    torch.optim.SGD([a.down for a in adapters(model).values()], lr=0.3).step()
    for layer in layers(model).values():
        (factors,) = layer.lowrank_adapters["default"].blocks()
        b, g = factors.up, layer.get_base_layer().weight.grad
        torch.testing.assert_close(factors.detach().delta(), -0.3 * 1.5**2 * b @ b.T @ g, rtol=1e-12, atol=1e-15)


@archs
def test_training_leaves_b_and_stays_in_its_span(arch: Arch, bases: dict[str, Path]) -> None:
    model = adapt(arch, bases[arch.name], live=False)
    found = load_subspace(bases[arch.name])
    train(model, arch, weight_decay=0.1)
    for adapter in adapters(model).values():
        (factors,) = adapter.blocks()
        assert torch.equal(factors.up, found.basis_for(adapter.site)[:, :4])
        b, delta = factors.up.double(), factors.detach().to(torch.float64).delta()
        assert delta.norm() > 1e-3
        assert (delta - b @ (b.T @ delta)).norm() < 1e-6 * delta.norm()


def test_approach_2_with_b_frozen_is_approach_1(bases: dict[str, Path]) -> None:
    one, two = (adapt(BERT, bases["bert"], live=False, approach=a) for a in (1, 2))
    for adapter in adapters(two).values():
        adapter.up.requires_grad_(False)
    heads = {n: p for n, p in one.named_parameters() if "modules_to_save" in n}
    for n, p in two.named_parameters():
        if n in heads:
            p.data.copy_(heads[n])
    for model in (one, two):
        train(model, BERT)
    assert torch.equal(BERT.out(one), BERT.out(two))
    for a, b in zip(adapters(one).values(), adapters(two).values(), strict=True):
        assert a.down.count_nonzero() > 0
        assert torch.equal(a.down, b.down)


def test_approach_2_moves_b(bases: dict[str, Path]) -> None:
    model = adapt(BERT, bases["bert"], live=False, approach=2)
    train(model, BERT)
    found = load_subspace(bases["bert"])
    for adapter in adapters(model).values():
        assert not torch.equal(adapter.up, found.basis_for(adapter.site)[:, :4])


def test_ranks_may_differ_from_module_to_module(bases: dict[str, Path]) -> None:
    model = adapt(BERT, bases["bert"], rank_pattern={"key": 2, "value": RANK}, target_modules=["query", "key", "value"])
    ups = {n.rpartition(".")[2]: a.blocks()[0].up for n, a in adapters(model).items()}
    assert {n: u.shape[1] for n, u in ups.items()} == {"query": 4, "key": 2, "value": RANK}
    assert ups["query"].data_ptr() == ups["key"].data_ptr() == ups["value"].data_ptr()
    adapted = BERT.out(model)
    torch.testing.assert_close(BERT.out(model.merge_and_unload()), adapted, rtol=1e-4, atol=1e-5)  # pyright: ignore


# In PEFT --------------------------------------------------------------------------------------------------------------


@archs
@approaches
def test_forward_is_merged_is_folded(arch: Arch, approach: int, bases: dict[str, Path]) -> None:
    model = adapt(arch, bases[arch.name], approach=approach)
    before, adapted, state = weights(model), arch.out(model), snapshot(model)
    assert not torch.allclose(adapted, arch.out(arch.build()), atol=1e-3)
    torch.testing.assert_close(arch.out(stock_lora(model, arch)), adapted, rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(arch.out(model), adapted, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert_same(weights(model), before)
    assert_same(snapshot(model), state)


@archs
@approaches
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_without_b_and_loaded_again(
    arch: Arch, approach: int, low_cpu_mem_usage: bool, bases: dict[str, Path], tmp_path: Path
) -> None:
    model = adapt(arch, bases[arch.name], approach=approach)
    model.save_pretrained(tmp_path / "a")
    saved = {k: v for k, v in load_file(tmp_path / "a/adapter_model.safetensors").items() if "lowrank" in k}
    assert {k.rpartition(".")[2] for k in saved} == ({"down"} if approach == 1 else {"down", "up"})
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["basis_hash"] == load_subspace(bases[arch.name]).hash
    assert config["basis"] == str(bases[arch.name])
    again = PeftModel.from_pretrained(arch.build(), tmp_path / "a", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(arch.out(again), arch.out(model))
    assert_same(get_peft_model_state_dict(again), get_peft_model_state_dict(model))


def test_a_relative_path_is_found_from_anywhere(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bases["bert"].parent)
    model = adapt(BERT, Path("bert.safetensors"))
    model.save_pretrained(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(BERT.out(PeftModel.from_pretrained(BERT.build(), tmp_path / "a")), BERT.out(model))


@approaches
def test_a_project_that_is_moved_takes_its_basis_along(approach: int, bases: dict[str, Path], tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "elsewhere" / "new"
    (old / "bases").mkdir(parents=True)
    shutil.copy(bases["bert"], old / "bases" / "qkv.safetensors")
    model = adapt(BERT, old / "bases" / "qkv.safetensors", approach=approach)
    model.save_pretrained(old / "runs" / "a" / "adapter")
    new.parent.mkdir()
    shutil.move(old, new)
    adapter = new / "runs" / "a" / "adapter"
    assert torch.equal(BERT.out(PeftModel.from_pretrained(BERT.build(), adapter)), BERT.out(model))
    assert read_config(adapter).basis == str(new / "bases" / "qkv.safetensors")  # pyright: ignore
    beside = Path(shutil.move(new / "bases" / "qkv.safetensors", adapter))
    assert read_config(adapter).basis == str(beside)  # pyright: ignore
    shutil.copy(bases["t5"], beside)  # of that name, but another
    if approach == 1:
        with pytest.raises(RankfoldError, match="there is no such file"):
            PeftModel.from_pretrained(BERT.build(), adapter)


@archs
@approaches
def test_folder_is_folded(arch: Arch, approach: int, bases: dict[str, Path], tmp_path: Path) -> None:
    base = arch.build()
    base.save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    model = adapt(arch, bases[arch.name], approach=approach)
    model.save_pretrained(tmp_path / "a")
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "base")}))
    report = fold_adapter(tmp_path / "a", tmp_path / "folded", pad="none")
    assert report.needed_rank == 4
    folded = PeftModel.from_pretrained(arch.build(), tmp_path / "folded")
    torch.testing.assert_close(arch.out(folded), arch.out(model), rtol=1e-4, atol=1e-5)


@approaches
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_b(approach: int, dtype: torch.dtype, bases: dict[str, Path], tmp_path: Path) -> None:
    model = adapt(BERT, bases["bert"], dtype=dtype, approach=approach)
    found = load_subspace(bases["bert"])
    for adapter in adapters(model).values():
        b = adapter.blocks()[0].up
        assert b.dtype == adapter.down.dtype == torch.float32
        if approach == 1:
            assert torch.equal(b, found.basis_for(adapter.site)[:, :4])
    model.save_pretrained(tmp_path / "a")
    again = PeftModel.from_pretrained(BERT.build(dtype=dtype), tmp_path / "a")
    assert torch.equal(BERT.out(again), BERT.out(model))
    narrow = adapt(BERT, bases["bert"], dtype=dtype, approach=approach, options={"autocast_adapter_dtype": False})
    assert all(f.up.dtype == f.down.dtype == dtype for a in adapters(narrow).values() for f in a.blocks())
    assert torch.isfinite(BERT.out(narrow)).all()
    narrow.merge_adapter(safe_merge=True)
    back = model.half().float()
    if approach == 1:
        for adapter in adapters(back).values():
            assert torch.equal(adapter.blocks()[0].up, found.basis_for(adapter.site)[:, :4])


def test_two_adapters_side_by_side(bases: dict[str, Path]) -> None:
    model = adapt(BERT, bases["bert"])
    first = BERT.out(model)
    model.add_adapter("other", CoraConfig(basis=str(bases["bert"]), r=3, task_type="SEQ_CLS"))
    stir(model, "other", seed=5)
    assert torch.equal(BERT.out(model), first)
    model.set_adapter("other")
    assert not torch.allclose(BERT.out(model), first, atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(BERT.out(model), first)
    model.delete_adapter("other")
    assert torch.equal(BERT.out(model), first)
    assert sum("lowrank" in n for n, _ in model.named_buffers()) == 3


def test_shapes_alone_are_enough_to_count(bases: dict[str, Path]) -> None:
    with torch.device("meta"):
        skeleton = BERT.make()
    model = get_peft_model(skeleton, CoraConfig(basis=bases["bert"], r=4))  # pyright: ignore[reportArgumentType]
    assert sum(p.numel() for _, p in adapter_parameters(model)) == 9 * 4 * 16


def test_values_come_back_after_to_empty(bases: dict[str, Path]) -> None:
    """As sharded loaders do it: shapes first, then a checkpoint, in which B is not."""
    wanted = adapt(BERT, bases["bert"])
    model = adapt(BERT, bases["bert"]).to("meta").to_empty(device="cpu")
    model.load_state_dict(wanted.state_dict())
    for a, b in zip(adapters(model).values(), adapters(wanted).values(), strict=True):
        assert torch.equal(a.factors().delta(), b.factors().delta())


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"basis": ""}, "CoraConfig: basis='' must be the path"),
        ({"basis": None}, "CoraConfig: basis=None must be the path"),
        ({"approach": 3}, "CoraConfig: approach=3 must be 1"),
        ({"init_lora_weights": "gaussian"}, "CoraConfig: init_lora_weights='gaussian'"),
    ],
)
def test_bad_configs(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoraConfig(**{"basis": "b.safetensors", **fields})


def test_a_bad_config_is_refused_before_there_is_a_model(basis: Path) -> None:
    with pytest.raises(ValueError, match="r=7 must be <= 6"):
        CoraConfig(basis=basis, r=7)  # pyright: ignore[reportArgumentType]
    config = CoraConfig(basis=basis, r=4)  # pyright: ignore[reportArgumentType]
    assert config.basis_hash == load_subspace(basis).hash
    before = copy.deepcopy(config)
    get_peft_model(BERT.build(), config)  # pyright: ignore[reportArgumentType]
    assert (config.basis, config.basis_hash) == (before.basis, before.basis_hash)
    basis.unlink()
    with pytest.raises(ValueError, match="there is no such file"):
        CoraConfig(basis=basis)  # pyright: ignore[reportArgumentType]
    assert (
        CoraConfig(basis=str(basis), basis_hash=before.basis_hash, r=4) == before
    )  # a saved one can be read without it


@approaches
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": RANK + 1}, f"CoraConfig: r={RANK + 1} must be <= {RANK}, the rank of the basis"),
        ({"rank_pattern": {"key": 9}}, "r=9 must be <= 6, the rank of the basis"),
        ({"target_modules": ["query", "dense"]}, r"no basis for \S*dense.* query, key, value"),
        ({"target_modules": "all-linear"}, "no basis for"),
        (
            {"basis": "absent.safetensors"},
            r"basis='/\S*absent.safetensors': there is no such file; bring the file there",
        ),
        ({"basis_hash": "0" * 64}, "another basis than this adapter was trained with .*basis_hash=000000000000"),
    ],
)
def test_refused_before_the_model_is_touched(basis: Path, approach: int, fields: dict, message: str) -> None:
    base = BERT.build()
    modules = {n: type(m) for n, m in base.named_modules()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, CoraConfig(**{"basis": basis, "r": 4, "approach": approach, **fields}))  # pyright: ignore
    assert {n: type(m) for n, m in base.named_modules()} == modules


@approaches
def test_damaged_files_are_refused(basis: Path, approach: int) -> None:
    whole = basis.read_bytes()
    tensors = load_file(basis)

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=rf"CoraConfig: basis='\S*qkv.safetensors': .*{message}"):
            adapt(BERT, basis, approach=approach)

    basis.write_bytes(whole[: len(whole) // 2])
    refused("truncated")
    save_file(tensors, basis)
    refused("is not a subspace file")
    flipped = bytearray(whole)
    flipped[-3] ^= 4
    basis.write_bytes(flipped)
    refused("changed after it was written|NaN or infinity")
    basis.write_bytes(whole)
    adapt(BERT, basis, approach=approach)


@approaches
def test_another_basis_is_refused_on_load(basis: Path, bases: dict[str, Path], approach: int, tmp_path: Path) -> None:
    model = adapt(BERT, basis, approach=approach)
    model.save_pretrained(tmp_path / "a")
    build_subspace(bases["bert"].parent / "bert0", basis, targets=QKV["bert"], rank=RANK, force=True)
    with pytest.raises(ValueError, match=r"another basis than this adapter was trained with .*restore that file"):
        PeftModel.from_pretrained(BERT.build(), tmp_path / "a")
    with pytest.raises(ValueError, match="another basis"):
        fold_adapter(tmp_path / "a", tmp_path / "folded", base=str(bases["bert"].parent / "bert0"))
    assert not (tmp_path / "folded").exists()
    config = PeftConfig.from_pretrained(str(tmp_path / "a"))
    config.basis = str(bases["bert"])  # the same content elsewhere will do  # pyright: ignore
    again = PeftModel.from_pretrained(BERT.build(), tmp_path / "a", config=config)
    assert torch.equal(BERT.out(again), BERT.out(model))


def test_without_its_file(basis: Path, tmp_path: Path) -> None:
    """Approach 1 is nothing without the basis; a saved approach 2 brings its own B."""
    for approach in (1, 2):
        model = adapt(BERT, basis, approach=approach)
        model.save_pretrained(tmp_path / str(approach))
    basis.unlink()
    with pytest.raises(ValueError, match="there is no such file"):
        PeftModel.from_pretrained(BERT.build(), tmp_path / "1")
    with pytest.raises(ValueError, match="there is no such file"):
        PeftModel.from_pretrained(BERT.build(), tmp_path / "2", is_trainable=True)
    again = PeftModel.from_pretrained(BERT.build(), tmp_path / "2")
    assert torch.equal(BERT.out(again), BERT.out(model))


def test_a_basis_of_another_model_is_refused(bases: dict[str, Path]) -> None:
    other = CoraConfig(basis=bases["t5"], r=4, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="no basis for"):
        get_peft_model(LLAMA.build(), other)  # pyright: ignore[reportArgumentType]


def test_a_basis_of_one_of_two_towers_is_refused_for_both(bases: dict[str, Path]) -> None:
    towers = nn.ModuleDict({"one": BERT.build(), "two": BERT.build()})
    fields = {"basis": bases["bert"], "r": 4, "approach": 1}
    with pytest.raises(RankfoldError, match=r"fits one\..*layer\.0 and two\..*layer\.0 alike"):
        get_peft_model(towers, CoraConfig(**fields, target_modules=["query"]))  # pyright: ignore[reportArgumentType]
    model = get_peft_model(towers, CoraConfig(**fields, target_modules=r"one\..*query"))  # pyright: ignore[reportArgumentType]
    assert {n.partition(".")[0] for n in layers(model)} == {"one"}
