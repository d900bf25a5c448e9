"""Promise 5 and the dtypes of promise 7 for every method: copies, casts, files, a fresh process, transformers' own interface."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import ARCHS, BERT, GPT2, LLAMA, MLP, T5, VIT, Arch
from peft import (
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from table import (
    LIVE,
    ROWS,
    Row,
    adapt,
    adapter_parameters,
    all_everywhere,
    assert_distinct,
    assert_same,
    in_turn,
    layers,
    on,
    rows,
    second,
    snapshot,
    spread,
    stir,
)
from torch import nn

# Copies, dtypes, devices --------------------------------------------------------------------------------------------


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _torch_saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


DUPLICATES = {"deepcopy": copy.deepcopy, "pickle": _pickled, "torch.save": _torch_saved}
CASTS = {
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "double": nn.Module.double,
    "to": lambda model: model.to(torch.bfloat16),
}


@spread([*ROWS, *LIVE], how=DUPLICATES)
def test_copies_are_whole_and_apart(row: Row, how: str, device: torch.device) -> None:
    model = adapt(LLAMA, row, device)
    second(model, LLAMA, row)
    if row not in LIVE:
        model.merge_adapter()
        model.unmerge_adapter()
    wanted, state = LLAMA.out(model), snapshot(model)
    twin = DUPLICATES[how](model)
    assert_same(snapshot(twin), state)
    assert torch.equal(LLAMA.out(twin), wanted)
    assert_distinct([p for n, p in twin.named_parameters(remove_duplicate=False) if "lowrank" in n])
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    stir(twin)  # through the owner of shared state: every layer of the copy must see it, the original must not
    assert not torch.equal(LLAMA.out(twin), wanted)
    assert torch.equal(LLAMA.out(model), wanted)
    for name, layer in layers(twin).items() if row not in LIVE else ():
        assert not torch.equal(layer.get_delta_weight("default"), layers(model)[name].get_delta_weight("default"))
    assert_same(snapshot(model), state)
    twin.delete_adapter("other")
    assert_same(snapshot(model), state)


@spread([*ROWS, *LIVE], cast=CASTS)
def test_casting(row: Row, cast: str, device: torch.device) -> None:
    """Everything follows, shared state too; vectors (gates) never go below float32."""
    if device.type == "mps" and cast == "double":
        pytest.skip("no float64 on mps")
    model = adapt(LLAMA, row, device)
    wanted = LLAMA.out(model)
    CASTS[cast](model)
    dtype = model.get_input_embeddings().weight.dtype
    for _, p in adapter_parameters(model):
        assert p.dtype == (dtype if p.ndim > 1 else torch.promote_types(dtype, torch.float32))
    out = LLAMA.out(model)
    assert out.dtype == dtype
    if dtype.itemsize < 4:
        torch.testing.assert_close(out.float(), wanted, rtol=0.1, atol=0.2)
        LLAMA.loss(model).backward()
        assert all(p.grad is not None and p.grad.dtype == p.dtype for _, p in adapter_parameters(model))
    else:
        torch.testing.assert_close(out.float(), wanted, rtol=1e-4, atol=1e-4)
    model.float()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@spread([*ROWS, *LIVE], arch=ARCHS.values(), autocast=[True, False])
def test_half_precision_base(arch: Arch, row: Row, autocast: bool, device: torch.device, tmp_path) -> None:
    def check(model: PeftModel, name: str) -> None:
        for _, p in adapter_parameters(model, name):
            assert p.dtype == (torch.float32 if autocast or p.ndim < 2 else torch.bfloat16)

    options = {"autocast_adapter_dtype": autocast}
    model = adapt(arch, row, device, dtype=torch.bfloat16, options=options)
    check(model, "default")
    assert arch.out(model).dtype == torch.bfloat16
    model.add_adapter("added", row.config(arch), **options)
    check(model, "added")
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    model.load_adapter(tmp_path, "loaded", **options)
    check(model, "loaded")
    model.set_adapter("loaded")
    loaded = arch.out(model)
    model.set_adapter("default")
    assert torch.equal(arch.out(model), loaded)
    again = PeftModel.from_pretrained(arch.build(device, torch.bfloat16), tmp_path, **options)
    check(again, "default")
    assert torch.equal(arch.out(again), loaded)


@rows
def test_to_meta_and_back(row: Row) -> None:
    model = adapt(MLP, row).to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.to_empty(device="cpu").load_state_dict(adapt(MLP, row).state_dict())
    assert torch.equal(MLP.out(model), MLP.out(adapt(MLP, row)))


SECOND_INJECTION = pytest.warns(UserWarning, match="Already found a `peft_config` attribute")


# Without a PeftModel ------------------------------------------------------------------------------------------------


@all_everywhere
def test_inject_adapter_in_model(arch: Arch, row: Row, device: torch.device) -> None:
    wrapped = adapt(arch, row, device, task_type=None)
    model = inject_adapter_in_model(row.config(arch, task_type=None), arch.build(device))
    assert type(model) is type(arch.build())
    state = get_peft_model_state_dict(wrapped)
    result = set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys
    assert torch.equal(arch.out(model.eval()), arch.out(wrapped))
    bare = {k.removeprefix("base_model.model."): v for k, v in state.items()}
    assert_same(get_peft_model_state_dict(model), bare)
    result = set_peft_model_state_dict(model, bare)
    assert not result.unexpected_keys
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n, _ in adapter_parameters(model)}
    with SECOND_INJECTION:
        inject_adapter_in_model(row.config(arch, task_type=None, r=9), model)  # PEFT lets one name be injected twice
    if row.facts.starts_at_base:
        torch.testing.assert_close(arch.out(model), arch.out(arch.build(device)), rtol=1e-6, atol=1e-6)


@on(LLAMA, GPT2, BERT, T5, VIT, some_rows=[*ROWS, *LIVE])
def test_transformers_own_interface(arch: Arch, row: Row, device: torch.device, tmp_path) -> None:
    """`model.add_adapter(config)` and all that transformers offers beside it."""
    base = arch.out(arch.build(device))
    model = arch.build(device)
    model.add_adapter(row.config(arch, task_type=None), "one")
    stir(model, "one")
    one = arch.out(model)
    with SECOND_INJECTION:
        model.add_adapter(row.config(arch, task_type=None), "two")
    stir(model, "two", seed=5)
    two = arch.out(model)
    assert model.active_adapters() == ["two"]
    model.set_adapter("one")
    assert torch.equal(arch.out(model), one)
    assert not torch.allclose(one, two, atol=1e-4)
    model.disable_adapters()
    assert torch.equal(arch.out(model), base)
    model.enable_adapters()
    assert torch.equal(arch.out(model), one)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()

    again = arch.build(device)
    again.load_adapter(tmp_path)
    assert_same(again.get_adapter_state_dict("default"), model.get_adapter_state_dict("one"))
    # its loader leaves tensors unaligned in memory, where a kernel may round otherwise
    torch.testing.assert_close(arch.out(again), one, rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for _, p in adapter_parameters(again))
    wrapped = PeftModel.from_pretrained(arch.build(device), tmp_path)
    assert torch.equal(arch.out(wrapped), one)

    model.set_adapter("two")
    model.delete_adapter("one")
    assert not any("one" in k.split(".") for k in model.state_dict())
    assert torch.equal(arch.out(model), two)
    model.delete_adapter("two")
    assert not any("lowrank_" in k for k in model.state_dict())
    assert torch.equal(arch.out(model), base)


# Files --------------------------------------------------------------------------------------------------------------


@all_everywhere
def test_save_and_load(arch: Arch, row: Row, device: torch.device, tmp_path) -> None:
    model = adapt(arch, row, device)
    wanted, state = arch.out(model), get_peft_model_state_dict(model)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert_same({k: t.to(device) for k, t in saved.items()}, state)
    assert not any("default" in key for key in saved)
    assert "library_name: peft" in (tmp_path / "README.md").read_text()

    again = PeftModel.from_pretrained(arch.build(device), tmp_path)
    assert_same(snapshot(again), snapshot(model))
    assert torch.equal(arch.out(again), wanted)
    assert not any(p.requires_grad for p in again.parameters())
    assert again.peft_config["default"].inference_mode
    assert not again.training

    trainable = PeftModel.from_pretrained(arch.build(device), tmp_path, "mine", is_trainable=True)
    flags = {n.replace("mine", "default"): p.requires_grad for n, p in trainable.named_parameters()}
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert torch.equal(arch.out(trainable), wanted)

    lazy = PeftModel.from_pretrained(arch.build(device), tmp_path, low_cpu_mem_usage=True)
    result = lazy.load_adapter(tmp_path, "later", low_cpu_mem_usage=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert {p.device.type for p in lazy.parameters()} == {device.type}
    for name in ("default", "later"):
        lazy.set_adapter(name)
        assert_same(get_peft_model_state_dict(lazy, adapter_name=name), state)
        torch.testing.assert_close(arch.out(lazy), wanted, rtol=1e-4, atol=1e-5)  # unaligned memory rounds otherwise
    assert_distinct([p for n, p in lazy.named_parameters() if "lowrank" in n])


@rows
def test_old_file_format(row: Row, device: torch.device, tmp_path) -> None:
    model = adapt(LLAMA, row, device)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    again = PeftModel.from_pretrained(LLAMA.build(device), tmp_path)
    assert torch.equal(LLAMA.out(again), LLAMA.out(model))


@rows
def test_save_some_of_several(row: Row, device: torch.device, tmp_path) -> None:
    model = adapt(LLAMA, row, device)
    for name in ("default2", "other_default", "foodefault_bar", "efaul"):
        second(model, LLAMA, row, name)
    model.save_pretrained(tmp_path / "some", selected_adapters=["default", "efaul"])
    assert {p.name for p in (tmp_path / "some").iterdir() if p.is_dir()} == {"efaul"}
    model.save_pretrained(tmp_path / "all")
    assert {p.name for p in (tmp_path / "all").iterdir() if p.is_dir()} == set(model.peft_config) - {"default"}
    for name in model.peft_config:
        folder = tmp_path / "all" / ("" if name == "default" else name)
        assert_same(
            {k: t.to(device) for k, t in load_file(folder / "adapter_model.safetensors").items()},
            get_peft_model_state_dict(model, adapter_name=name),
        )


@rows
def test_state_dict_into_an_adapter_of_another_name(row: Row, device: torch.device) -> None:
    source = adapt(LLAMA, row, device)
    state = get_peft_model_state_dict(source)
    keys = list(state)
    target = adapt(LLAMA, row, device, seed=9, name="q_proj")
    assert not torch.equal(LLAMA.out(target), LLAMA.out(source))
    result = set_peft_model_state_dict(target, state, adapter_name="q_proj")
    assert not result.unexpected_keys
    assert list(state) == keys
    assert torch.equal(LLAMA.out(target), LLAMA.out(source))
    assert_same(get_peft_model_state_dict(target, adapter_name="q_proj"), state)


@rows
def test_config_can_be_given(row: Row, device: torch.device, tmp_path) -> None:
    model = adapt(LLAMA, row, device)
    model.save_pretrained(tmp_path)
    config = row.config(LLAMA)
    config.revision = "given"  # which the folder's does not say
    again = PeftModel.from_pretrained(LLAMA.build(device), tmp_path, config=config)
    assert again.peft_config["default"].revision == "given"
    assert torch.equal(LLAMA.out(again), LLAMA.out(model))


def test_a_fresh_process_answers_the_same(tmp_path, subtests: pytest.Subtests) -> None:
    """Every row in one process, because a start takes longer than all of them: bit for bit, two adapters side by side."""
    wanted = {}
    for arch, row in in_turn("a fresh process", (LLAMA, GPT2, T5)):
        folder = tmp_path / str(row) / arch.name
        model = adapt(arch, row)
        second(model, arch, row)
        model.save_pretrained(folder)
        torch.save(model, folder / "model.pt")
        answers = {"default": arch.out(model), "pickled": arch.out(model)}
        model.set_adapter("other")
        answers["other"] = arch.out(model)
        model.base_model.set_adapter(["default", "other"])
        answers["both"] = arch.out(model)
        wanted[folder] = answers
    script = Path(__file__).with_name("fresh_process.py")
    # as many threads as here, or sums round otherwise
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, script, tmp_path], check=True, timeout=300, env=env)
    for folder, answers in wanted.items():
        with subtests.test(f"{folder.parent.name}-{folder.name}"):
            assert_same(load_file(folder / "answers.safetensors"), answers)
