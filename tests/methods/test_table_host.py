"""What the host promises of every method, whatever is done around it: one config for two adapters, a second injection, a cast while
merged, a compiled base, two models in one training, two threads at once."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHS, LLAMA, Arch
from peft import PeftModel, get_peft_model
from table import FIRST, LIVE, Row, adapt, adapter_parameters, assert_same, layers, on, snapshot, stir, weights
from torch import Tensor, nn

from rankfold import attach
from rankfold.errors import RankfoldError
from rankfold.fold import fold_state_dict

every_method = pytest.mark.parametrize("row", [*FIRST, *LIVE], ids=str)


@every_method
def test_one_config_object_for_two_adapters(row: Row, tmp_path: Path) -> None:
    """Each has its own, the one that was given stays as it was, and both are read back."""
    config = row.config(LLAMA)
    given = copy.deepcopy(config)
    model = get_peft_model(LLAMA.build(), config).eval()
    stir(model)
    model.add_adapter("other", config)
    stir(model, "other", seed=5)
    assert config == given
    assert len({id(config), *map(id, model.peft_config.values())}) == 3
    model.save_pretrained(str(tmp_path))
    for name, folder in (("default", tmp_path), ("other", tmp_path / "other")):
        model.set_adapter(name)
        read = PeftModel.from_pretrained(LLAMA.build(), str(folder)).eval()
        torch.testing.assert_close(LLAMA.out(read), LLAMA.out(model))


@every_method
def test_a_second_injection_leaves_nothing_of_the_first(row: Row, tmp_path: Path) -> None:
    """A notebook's cell that is run again with fewer targets: what is left out must not stay active, nor be saved."""
    base = LLAMA.build()
    get_peft_model(base, row.config(LLAMA, r=4, rank_pattern={}, alpha_pattern={}))
    fewer = row.config(LLAMA, r=4, rank_pattern={}, alpha_pattern={}, target_modules=[LLAMA.targets[0]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about a second time
        model = get_peft_model(base, fewer).eval()
    stir(model)
    assert adapter_parameters(model)
    assert not [n for n, p in model.named_parameters() if p.requires_grad and f".{LLAMA.targets[1]}." in n]
    model.save_pretrained(str(tmp_path))
    read = PeftModel.from_pretrained(LLAMA.build(), str(tmp_path)).eval()
    torch.testing.assert_close(LLAMA.out(read), LLAMA.out(model))


@on(*ARCHS.values(), some_rows=FIRST)
def test_a_cast_while_merged(arch: Arch, row: Row) -> None:
    """The base comes back in the model's dtype, as if it had been cast unmerged."""
    model = adapt(arch, row)
    before = weights(model)
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    for name, weight in weights(model).items():
        assert torch.equal(weight, before[name].bfloat16()), name


@every_method
def test_a_compiled_model_folds_as_the_model(row: Row) -> None:
    """Its wrappers are in the names of modules, and would be in the keys of the fold."""
    model = adapt(LLAMA, row)
    compiled: Any = torch.compile(model, backend="eager")
    plain, wrapped = _folded(model), _folded(compiled)
    assert wrapped.keys() == plain.keys()
    assert all(torch.equal(wrapped[key], plain[key]) for key in plain)


def _folded(model: nn.Module) -> dict[str, Tensor]:
    try:
        return dict(fold_state_dict(model))
    except RankfoldError as error:
        return {str(error): torch.empty(0)}  # one that has no exact fold is refused alike


class Towers(nn.Module):
    def __init__(self, models: dict[str, PeftModel]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models.values())


def _train(arch: Arch, models: dict[str, PeftModel], steps: int = 6) -> None:
    towers = Towers(models).train()
    optimizer = torch.optim.AdamW([p for p in towers.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    handle = attach(towers, optimizer, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(arch.loss(model) for model in models.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
    handle.remove()


@every_method
def test_two_models_in_one_training_are_each_trained_as_if_alone(row: Row) -> None:
    def towers() -> dict[str, PeftModel]:
        return {name: adapt(LLAMA, row, name=name, live=False, seed=seed) for name, seed in (("one", 2), ("two", 3))}

    together, apart = towers(), towers()
    _train(LLAMA, together)
    for name, model in apart.items():
        torch.manual_seed(0)
        _train(LLAMA, {name: model})
        assert_same(snapshot(together[name]), snapshot(model))


@every_method
def test_forwards_of_two_threads_do_not_meet(row: Row) -> None:
    """Both are in the middle of the model before either goes on."""
    model = adapt(
        LLAMA, row, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"], rank_pattern={}, alpha_pattern={}
    )
    batches = [LLAMA.inputs(rows=2 + i, seed=i) for i in range(2)]
    alone = [_logits(model, batch) for batch in batches]
    together = threading.Barrier(2)
    names = list(layers(model))
    hooks = [layers(model)[name].register_forward_pre_hook(_wait(together)) for name in names[1::2]]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda batch: _logits(model, batch), batches))
    for hook in hooks:
        hook.remove()
    for a, b in zip(alone, found, strict=True):
        torch.testing.assert_close(a, b)


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def _wait(barrier: threading.Barrier) -> Callable[..., None]:
    def hook(module: nn.Module, args: object) -> None:
        barrier.wait(timeout=60)

    return hook
