"""What PEFT asks of a method, for every method: targeting, several adapters, mixed batches, reports, configs."""

from __future__ import annotations

import copy
import json
import pickle
import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import peft
import pytest
import torch
from models import ARCHS, BERT, GPT2, LLAMA, MLP, T5, TIED, VIT, Arch, linear_shapes
from peft import (
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from table import (
    FIRST,
    LIVE,
    ROWS,
    Row,
    adapt,
    adapter_buffers,
    adapter_parameters,
    all_everywhere,
    all_rows,
    assert_distinct,
    assert_same,
    everywhere,
    first_rows,
    layers,
    on,
    rows,
    second,
    snapshot,
    spread,
    weights,
)
from torch import nn

from rankfold.host.linear_layer import AdaptedLinear

# Targeting ----------------------------------------------------------------------------------------------------------


@on(*(arch for arch in ARCHS.values() if arch.default))
def test_default_targets_are_those_of_peft(arch: Arch, row: Row) -> None:
    lora = get_peft_model(arch.build(), peft.LoraConfig(task_type=arch.task, fan_in_fan_out=arch is GPT2))
    if row.config(arch).default_targets() is not None:
        pytest.skip("this method names default targets of its own")
    ours = adapt(arch, row, target_modules=None, rank_pattern={}, alpha_pattern={})
    assert ours.base_model.targeted_module_names == lora.base_model.targeted_module_names
    assert set(layers(ours)) == set(lora.base_model.targeted_module_names)


@on(VIT, MLP, some_rows=FIRST)
def test_no_default_targets_is_an_error(arch: Arch, row: Row) -> None:
    if row.config(arch).default_targets() is not None:
        pytest.skip("this method names default targets of its own")
    with pytest.raises(ValueError, match="target_modules"):
        adapt(arch, row, target_modules=None)


WAYS: dict[str, tuple[dict[str, Any], str | None]] = {
    "list": ({"target_modules": ["q_proj"]}, r"model\.layers\.\d\.self_attn\.q_proj"),
    "tuple": ({"target_modules": ("q_proj", "up_proj")}, r"model\.layers\.\d\.(self_attn\.q|mlp\.up)_proj"),
    "part of a pattern": ({"target_modules": "q_proj"}, None),  # a string is a whole regular expression
    "pattern": ({"target_modules": r".*\.1\..*(k|v)_proj"}, r"model\.layers\.1\.self_attn\.[kv]_proj"),
    "whole name": ({"target_modules": ["model.layers.2.mlp.gate_proj"]}, r"model\.layers\.2\.mlp\.gate_proj"),
    "all-linear": ({"target_modules": "all-linear"}, r"model\.layers\.\d\..*_proj"),  # and not the head
    "ALL-LINEAR": ({"target_modules": "ALL-LINEAR"}, r"model\.layers\.\d\..*_proj"),
    "all-linear but": (
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        r"model\..*(q|k|v|o|gate|up)_proj",
    ),
    "list but": ({"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"}, r"model\.layers\.[12]\..*q_proj"),
    "one layer": ({"target_modules": ["q_proj"], "layers_to_transform": 1}, r"model\.layers\.1\..*q_proj"),
    "two layers": (
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 2]},
        r"model\.layers\.[02]\..*[qo]_proj",
    ),
    "layers' name": (
        {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": "layers"},
        r"model\.layers\.2\..*q_proj",
    ),
}


@spread(FIRST, way=WAYS)
def test_ways_to_name_targets(row: Row, way: str, device: torch.device) -> None:
    changes, wanted = WAYS[way]
    if wanted is None:
        with pytest.raises(ValueError, match="not found in the base model"):
            adapt(LLAMA, row, device, **changes)
        return
    model = adapt(LLAMA, row, device, **changes)
    expected = {n for n, m in LLAMA.build().named_modules() if isinstance(m, nn.Linear) and re.fullmatch(wanted, n)}
    assert set(layers(model)) == expected
    assert not torch.allclose(LLAMA.out(model), LLAMA.out(LLAMA.build(device)))
    model.merge_and_unload()


@on(GPT2, BERT, T5, VIT, TIED, some_rows=FIRST)
def test_all_linear_everywhere(arch: Arch, row: Row, device: torch.device) -> None:
    """Every linear but the head, once; a later adapter finds the same modules though they are wrapped by now."""
    model = adapt(arch, row, device, target_modules="all-linear")
    found = set(layers(model))
    model.add_adapter("other", row.config(arch, target_modules="all-linear"))
    assert set(layers(model)) == found
    assert not any(n.endswith("lm_head") for n in found)
    assert torch.isfinite(arch.out(model)).all()


@rows
def test_modules_to_save(row: Row, device: torch.device, tmp_path) -> None:
    model = adapt(BERT, row, device)
    head = model.base_model.model.classifier
    assert isinstance(head, peft.utils.ModulesToSaveWrapper)
    with torch.no_grad():
        head.modules_to_save["default"].weight.add_(1.0)
    wanted = BERT.out(model)
    assert head.modules_to_save["default"].weight.requires_grad
    assert not head.original_module.weight.requires_grad
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(BERT.build(device), tmp_path)
    assert torch.equal(BERT.out(again), wanted)
    with model.disable_adapter():
        assert torch.equal(BERT.out(model), BERT.out(BERT.build(device)))
    merged = model.merge_and_unload()
    torch.testing.assert_close(BERT.out(merged), wanted, rtol=1e-4, atol=1e-5)
    assert type(merged.classifier) is nn.Linear


@rows
def test_modules_to_save_of_a_plain_module(row: Row, device: torch.device, tmp_path) -> None:
    model = adapt(MLP, row, device, modules_to_save=["head"])
    second(model, MLP, row, modules_to_save=["head", "norm"])
    for name in ("default", "other"):
        model.set_adapter(name)
        with torch.no_grad():
            model.base_model.model.head.modules_to_save[name].weight.mul_(2.0)
        model.save_pretrained(tmp_path, selected_adapters=[name])
    wanted = {name: MLP.out(model) for name in ["other"]}
    again = PeftModel.from_pretrained(MLP.build(device), tmp_path)
    again.load_adapter(tmp_path / "other", "other")
    again.set_adapter("other")
    assert torch.equal(MLP.out(again), wanted["other"])
    assert_same(get_peft_model_state_dict(again), get_peft_model_state_dict(model))


# Several adapters ---------------------------------------------------------------------------------------------------


@everywhere
def test_two_adapters_at_once_add_up(arch: Arch, row: Row, device: torch.device) -> None:
    head = {"task_type": None}  # PEFT allows one trained head at a time
    model = adapt(arch, row, device, **head)
    second(model, arch, row, **head)
    alone = {"default": arch.out(model)}
    model.set_adapter("other")
    alone["other"] = arch.out(model)
    assert not torch.allclose(alone["default"], alone["other"], atol=1e-4)

    model.base_model.set_adapter(["default", "other"])
    both = arch.out(model)
    before = weights(model)
    reference = arch.build(device)
    with torch.no_grad():
        for name, layer in layers(model).items():
            delta = layer.get_delta_weight("default") + layer.get_delta_weight("other")
            reference.get_submodule(name).weight += delta
    torch.testing.assert_close(both, arch.out(reference), rtol=1e-4, atol=1e-5)

    model.merge_adapter()
    assert all(layer.merged_adapters == ["default", "other"] for layer in layers(model).values())
    torch.testing.assert_close(arch.out(model), both, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert_same(weights(model), before)
    model.set_adapter("default")
    assert torch.equal(arch.out(model), alone["default"])


@spread(dtype=[torch.float32, torch.bfloat16])
def test_merging_one_after_the_other(row: Row, dtype: torch.dtype, device: torch.device) -> None:
    model = adapt(LLAMA, row, device, dtype=dtype)
    second(model, LLAMA, row)
    before = weights(model)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(["other"])
    assert {tuple(layer.merged_adapters) for layer in layers(model).values()} == {("default", "other")}
    with pytest.warns(UserWarning, match="nothing to do"):
        model.merge_adapter(["other"])
    model.unmerge_adapter()
    assert_same(weights(model), before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert_same(weights(model), before)


@rows
def test_switching_unmerges(row: Row, device: torch.device) -> None:
    model = adapt(LLAMA, row, device)
    second(model, LLAMA, row)
    model.set_adapter("other")
    wanted, before = LLAMA.out(model), weights(model)
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("other")
    assert_same(weights(model), before)
    assert torch.equal(LLAMA.out(model), wanted)


@everywhere
def test_disabling(arch: Arch, row: Row, device: torch.device) -> None:
    base = arch.out(arch.build(device))
    model = adapt(arch, row, device)
    on = arch.out(model)
    with model.disable_adapter():
        assert torch.equal(arch.out(model), base)
        assert not any(p.requires_grad for n, p in model.named_parameters() if "lowrank_" in n)
        with model.disable_adapter():
            pass
        assert torch.equal(arch.out(model), base)
    assert torch.equal(arch.out(model), on)
    assert all(p.requires_grad for _, p in adapter_parameters(model))
    model.merge_adapter()
    with model.disable_adapter():  # PEFT's way: it takes the merged update out
        assert torch.equal(arch.out(model), base)
    assert torch.equal(arch.out(model), on)


@spread([*ROWS, *LIVE], arch=ARCHS.values(), active=[True, False])
def test_deleting(arch: Arch, row: Row, active: bool, device: torch.device) -> None:
    model = adapt(arch, row, device)
    second(model, arch, row)
    model.set_adapter("other")
    other = arch.out(model)
    model.set_adapter("default")
    state = get_peft_model_state_dict(model, adapter_name="other")
    if active:
        with pytest.warns(UserWarning, match="Setting active adapter to other"):
            model.delete_adapter("default")
    else:
        model.set_adapter("other")
        model.delete_adapter("default")
    assert not any("default" in k for k in model.state_dict())
    assert not adapter_parameters(model)
    assert list(model.peft_config) == ["other"]
    assert torch.equal(arch.out(model), other)
    assert_same(get_peft_model_state_dict(model, adapter_name="other"), state)

    model.add_adapter("default", row.config(arch))  # the name is free again, and nothing of the old one is left
    model.set_adapter("default")
    if row.facts.starts_at_base:
        torch.testing.assert_close(arch.out(model), arch.out(arch.build(device)), rtol=1e-6, atol=1e-6)
    model.delete_adapter("other")
    model.delete_adapter("default")
    assert not model.peft_config
    assert not any("lowrank_" in k for k in model.state_dict())
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("default")


@rows
def test_deleting_while_merged_is_refused(row: Row, device: torch.device) -> None:
    model = adapt(LLAMA, row, device)
    second(model, LLAMA, row)
    model.merge_adapter(["default"])
    state = snapshot(model)
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    assert_same(snapshot(model), state)
    model.delete_adapter("other")
    assert not any("other" in k for k in model.state_dict())
    model.unmerge_adapter()
    assert_same(weights(model), weights(adapt(LLAMA, row, device)))


NAMES = ["mlp", "q_proj", "self_attn", "model", "layers", "weight", "down", "0", "lowrank"]


@spread(name=NAMES)
def test_adapter_named_like_a_module(row: Row, name: str, device: torch.device, tmp_path) -> None:
    """huggingface/peft#3584: tensors must not vanish from the file because another adapter's name is in their key."""
    plain = adapt(LLAMA, row, device)
    wanted = {"default": LLAMA.out(plain), "state": get_peft_model_state_dict(plain)}
    model = adapt(LLAMA, row, device)
    with prefix_warning(name):
        second(model, LLAMA, row, name)
    model.set_adapter(name)
    other = LLAMA.out(model)
    assert_same(get_peft_model_state_dict(model, adapter_name="default"), wanted["state"])
    like = get_peft_model_state_dict(adapt(LLAMA, row, device, r=5, rank_pattern={}))
    assert get_peft_model_state_dict(model, adapter_name=name).keys() == like.keys()
    model.save_pretrained(tmp_path)

    again = PeftModel.from_pretrained(LLAMA.build(device), tmp_path)
    assert torch.equal(LLAMA.out(again), wanted["default"])
    with prefix_warning(name):
        again.load_adapter(tmp_path / name, name)
    again.set_adapter(name)
    assert torch.equal(LLAMA.out(again), other)
    again.set_adapter("default")
    again.delete_adapter(name)
    assert torch.equal(LLAMA.out(again), wanted["default"])
    first = adapt(LLAMA, row, device, name="only" if name in "lowrank_" else name)
    assert torch.equal(LLAMA.out(first), wanted["default"])


def prefix_warning(name: str) -> AbstractContextManager:
    return pytest.warns(UserWarning, match="contained in the prefix") if name in "lowrank_" else nullcontext()


@all_rows
def test_later_adapter_with_other_targets(row: Row, device: torch.device, tmp_path) -> None:
    """Its modules must not run until it is active, and its shared state is its own."""
    model = adapt(LLAMA, row, device)
    alone, names = LLAMA.out(model), set(layers(model))
    second(model, LLAMA, row, target_modules=["q_proj", "up_proj"], alpha_pattern={})
    assert torch.equal(LLAMA.out(model), alone)
    assert {n for n in layers(model) if n not in names} == {f"model.layers.{i}.mlp.up_proj" for i in range(3)}
    assert not any(p.requires_grad for _, p in adapter_parameters(model, "other"))
    model.set_adapter("other")
    other = LLAMA.out(model)
    assert not torch.allclose(other, alone, atol=1e-3)
    assert not any(p.requires_grad for _, p in adapter_parameters(model, "default"))
    assert all(p.requires_grad for _, p in adapter_parameters(model, "other"))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(LLAMA.build(device), tmp_path / "other", "mine")
    assert torch.equal(LLAMA.out(again), other)
    again.load_adapter(tmp_path, "second")
    again.set_adapter("second")
    assert torch.equal(LLAMA.out(again), alone)
    model.delete_adapter("default")
    assert torch.equal(LLAMA.out(model), other)


@rows
def test_gradients_are_asked_for_where_they_should(row: Row, device: torch.device) -> None:
    model = adapt(LLAMA, row, device)
    second(model, LLAMA, row)

    def wants() -> dict[str, set[bool]]:
        return {name: {p.requires_grad for _, p in adapter_parameters(model, name)} for name in ("default", "other")}

    assert wants() == {"default": {True}, "other": {False}}
    model.set_adapter("other")
    assert wants() == {"default": {False}, "other": {True}}
    model.set_adapter("other", inference_mode=True)
    assert wants() == {"default": {False}, "other": {False}}
    model.base_model.set_adapter(["default", "other"])
    assert wants() == {"default": {True}, "other": {True}}
    model.set_requires_grad("default", False)
    assert wants() == {"default": {False}, "other": {True}}
    second(model, LLAMA, row, "third")  # a third one leaves the others as they are
    assert wants() == {"default": {False}, "other": {True}}
    assert not any(p.requires_grad for _, p in adapter_parameters(model, "third"))
    model.set_requires_grad(["default", "third"])
    assert wants() == {"default": {True}, "other": {True}}
    assert all(p.requires_grad for _, p in adapter_parameters(model, "third"))
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lowrank" not in n)


@all_rows
def test_adapters_share_nothing(row: Row, device: torch.device) -> None:
    model = adapt(LLAMA, row, device)
    config = row.config(LLAMA)
    for name in ("default2", "other_default", "efaul"):
        model.add_adapter(name, config)
    everything = [p for n, p in model.named_parameters() if "lowrank" in n]
    assert_distinct(everything)
    per = [len(adapter_parameters(model, n)) for n in ("default", "default2", "other_default", "efaul")]
    assert len(set(per)) == 1
    assert sum(per) == len(everything)
    sizes = {n: len(get_peft_model_state_dict(model, adapter_name=n)) for n in model.peft_config}
    assert set(sizes.values()) == {per[0] + len(adapter_buffers(model))}
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("default2", config)
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("x", peft.LoraConfig(target_modules=["q_proj"]))


# Mixed batches, generation ------------------------------------------------------------------------------------------


@all_everywhere
def test_mixed_batch(arch: Arch, row: Row, device: torch.device) -> None:
    model = adapt(arch, row, device)
    second(model, arch, row)
    batch = arch.inputs(device, rows=5)
    names = ["other", "__base__", "default", "other", "default"]
    with torch.no_grad():
        mixed = arch.out(model, batch, adapter_names=names)
        alone = {}
        for name in ("default", "other"):
            model.set_adapter(name)
            alone[name] = arch.out(model, batch)
        with model.disable_adapter():
            alone["__base__"] = arch.out(model, batch)
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], alone[name][i], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(arch.out(model, batch, adapter_names=5 * ["__base__"]), alone["__base__"])
    assert torch.equal(arch.out(model, batch), alone["other"])  # no hook stays behind


@rows
def test_mixed_batch_refuses(row: Row, device: torch.device) -> None:
    model = adapt(LLAMA, row, device)
    second(model, LLAMA, row, target_modules=["up_proj"], alpha_pattern={})
    batch = LLAMA.inputs(device)
    names = ["default", "other", "__base__"]
    assert torch.isfinite(LLAMA.out(model, batch, adapter_names=names)).all()
    with pytest.raises(ValueError, match="number of inputs, but got 2 and 3"):
        LLAMA.out(model, batch, adapter_names=names[:2])
    with pytest.raises(ValueError, match=r"non-existing adapter.*: gone"):
        LLAMA.out(model, batch, adapter_names=["default", "gone", "__base__"])
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        LLAMA.out(model, batch, adapter_names=names)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        LLAMA.out(model, batch, adapter_names=names)
    with pytest.warns(UserWarning, match="Already unmerged"):  # where only the other adapter is
        model.unmerge_adapter()
    assert torch.isfinite(LLAMA.out(model, batch, adapter_names=names)).all()


@on(LLAMA, GPT2, T5, some_rows=[*ROWS, *LIVE])
def test_generate(arch: Arch, row: Row, device: torch.device) -> None:
    model = adapt(arch, row, device)
    ids = arch.inputs(device)["input_ids"]
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    how |= {"output_logits": True, "attention_mask": torch.ones_like(ids)}
    result = model.generate(input_ids=ids, **how)
    first = (
        arch.out(model)[:, -1]
        if arch is not T5
        else model(input_ids=ids, decoder_input_ids=ids[:, :1] * 0).logits[:, 0]
    )
    torch.testing.assert_close(result.logits[0], first, rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    if row not in LIVE:
        model.merge_adapter()
        merged = model.generate(input_ids=ids, **how)
        assert torch.equal(result.sequences, merged.sequences)
        model.unmerge_adapter()

    second(model, arch, row)
    names = ["other", "default", "__base__"]
    for beams in (1, 2):
        mixed = model.generate(input_ids=ids, adapter_names=names, num_beams=beams, **how).sequences
        for i, name in enumerate(names[:2]):
            model.set_adapter(name)
            alone = model.generate(input_ids=ids, num_beams=beams, **how).sequences
            assert torch.equal(mixed[i], alone[i])


# What PEFT reports --------------------------------------------------------------------------------------------------


@rows
def test_status_and_printing(row: Row, device: torch.device, capsys) -> None:
    model = adapt(LLAMA, row, device)
    second(model, LLAMA, row)
    status = model.get_model_status()
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.merged_adapters == []
    assert status.requires_grad == {"default": True, "other": False}
    assert status.available_adapters == ["default", "other"]
    assert status.num_adapter_layers == 6
    assert status.trainable_params == sum(p.numel() for _, p in adapter_parameters(model))
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    assert {s.module_type for s in model.get_layer_status()} == {"AdaptedLinear"}
    model.print_trainable_parameters()
    assert f"trainable params: {status.trainable_params:,d}" in capsys.readouterr().out
    assert f"r={model.peft_config['default'].rank_at('q_proj')}" in repr(model)


@on(LLAMA, GPT2)
def test_layer_looks_like_its_base(arch: Arch, row: Row, device: torch.device) -> None:
    """transformers reads `.weight` and `.bias` off its own layers (T5's `wo.weight.dtype`)."""
    for layer in layers(adapt(arch, row, device)).values():
        assert isinstance(layer, AdaptedLinear)
        assert layer.weight is layer.base_layer.weight
        assert layer.bias is layer.base_layer.bias


@first_rows
def test_mixed_model_is_refused_clearly(row: Row) -> None:
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(LLAMA.build(), row.config(LLAMA), mixed=True)
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        PeftMixedModel(LLAMA.build(), row.config(LLAMA))


# Configs ------------------------------------------------------------------------------------------------------------


@all_everywhere
def test_config_survives_json(arch: Arch, row: Row, tmp_path) -> None:
    config = row.config(
        arch, exclude_modules=["lm_head"], modules_to_save=["head"], base_model_name_or_path="x", revision="main"
    )
    config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["peft_type"] == f"RANKFOLD_{row.facts.method.upper()}"
    for read in (PeftConfig.from_pretrained(tmp_path), type(config).from_pretrained(tmp_path)):
        assert type(read) is type(config)
        assert {**read.to_dict(), "inference_mode": False} == {**config.to_dict(), "inference_mode": False}
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    json.dumps({k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()})


@first_rows
def test_config_takes_what_lora_config_takes(row: Row) -> None:
    """Changing the class name changes the method."""
    shared = ["r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save", "bias"]
    shared += ["layers_to_transform", "layers_pattern", "use_rslora", "rank_pattern", "alpha_pattern"]
    shared += ["init_lora_weights", "fan_in_fan_out", "task_type", "inference_mode", "base_model_name_or_path"]
    ours, peft_own = row.config(LLAMA).to_dict(), peft.LoraConfig().to_dict()
    assert set(shared) <= ours.keys() & peft_own.keys()


@rows
def test_config_is_not_changed_by_use(row: Row) -> None:
    """But for the two things PEFT itself fills in."""
    config = row.config(LLAMA)
    before = {**config.to_dict(), "base_model_name_or_path": ""}
    get_peft_model(LLAMA.build(), config)
    assert {**config.to_dict(), "base_model_name_or_path": ""} == before


@everywhere
def test_layer_shapes_helper_agrees(arch: Arch, row: Row) -> None:
    assert set(linear_shapes(arch.build(), arch.targets)) == set(layers(adapt(arch, row)))
