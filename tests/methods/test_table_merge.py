"""Promise 3 for every method, through all of PEFT's ways to merge, unmerge, unload and convert."""

from __future__ import annotations

import peft
import pytest
import torch
from models import LLAMA, MLP, TIED, Arch
from peft import (
    PeftModel,
    get_peft_model,
    set_peft_model_state_dict,
)
from table import (
    Row,
    adapt,
    adapter_parameters,
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
from transformers import AutoModelForCausalLM

# Merging and unloading ----------------------------------------------------------------------------------------------


@everywhere
def test_merge_and_unload(arch: Arch, row: Row, device: torch.device) -> None:
    model = adapt(arch, row, device)
    wanted, keys = arch.out(model), arch.build().state_dict().keys()
    types = {n: type(m) for n, m in arch.build().named_modules()}
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(arch.out(merged), wanted, rtol=1e-4, atol=1e-5)
    assert merged.state_dict().keys() == keys
    assert {n: type(m) for n, m in merged.named_modules()} == types
    assert not hasattr(merged, "peft_config")
    assert not hasattr(merged, "lowrank_shared")
    again = get_peft_model(merged, row.config(arch))  # and it can be adapted once more
    if row.facts.starts_at_base:
        torch.testing.assert_close(arch.out(again.eval()), arch.out(merged), rtol=1e-6, atol=1e-6)


@everywhere
def test_unload(arch: Arch, row: Row, device: torch.device) -> None:
    base = arch.build(device)
    bare = adapt(arch, row, device).unload()
    assert_same(bare.state_dict(), base.state_dict())
    assert torch.equal(arch.out(bare), arch.out(base))


@rows
def test_merge_and_unload_of_a_choice(row: Row, device: torch.device) -> None:
    model = adapt(LLAMA, row, device)
    second(model, LLAMA, row)
    model.set_adapter("other")
    wanted = LLAMA.out(model)
    model.set_adapter("default")
    merged = model.merge_and_unload(adapter_names=["other"])
    torch.testing.assert_close(LLAMA.out(merged), wanted, rtol=1e-4, atol=1e-5)


@spread(value=[float("nan"), float("inf")], how=["merge_adapter", "merge_and_unload"])
def test_safe_merge_of_a_broken_adapter_changes_nothing(row: Row, value: float, how: str, device: torch.device) -> None:
    model = adapt(LLAMA, row, device)
    with torch.no_grad():  # in the last layer alone, so that the others have been looked at before
        last = list(layers(model).values())[-1].lowrank_adapters["default"]
        next(p for p in last.parameters() if p.numel()).fill_(value)
    state = snapshot(model)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        getattr(model, how)(safe_merge=True)
    for key, tensor in snapshot(model).items():
        assert torch.equal(tensor.nan_to_num(), state[key].nan_to_num()), key
    assert not any(layer.merged for layer in layers(model).values())
    assert len(layers(model)) == 6


@rows
def test_safe_merge_sees_an_overflow_of_half(row: Row, device: torch.device) -> None:
    model = adapt(LLAMA, row, device, dtype=torch.float16)
    before = weights(model)
    with torch.no_grad():
        for _, p in adapter_parameters(model):
            p.mul_(3e5)  # one factor may be frozen
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert_same(weights(model), before)


@rows
def test_merging_in_training_mode_is_deterministic(row: Row, device: torch.device) -> None:
    outputs = [LLAMA.out(adapt(LLAMA, row, device).train().merge_and_unload()) for _ in range(2)]
    assert torch.equal(*outputs)


@first_rows
def test_tied_embeddings(row: Row, device: torch.device, tmp_path) -> None:
    model = adapt(TIED, row, device, target_modules="all-linear")
    wanted = TIED.out(model)
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedding
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(TIED.build(device), tmp_path)
    assert torch.equal(TIED.out(again), wanted)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").to(device).eval()
    torch.testing.assert_close(TIED.out(loaded), wanted, rtol=1e-4, atol=1e-5)


@on(LLAMA, MLP)
def test_peft_converts_it_to_lora(arch: Arch, row: Row, device: torch.device) -> None:
    """PEFT's own (dense SVD) conversion goes through our delta."""
    model = adapt(arch, row, device)
    assert model.supports_lora_conversion()
    config, state = peft.convert_to_lora(model, rank=12)
    lora = get_peft_model(arch.build(device), config)
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(arch.out(lora.eval()), arch.out(model), rtol=1e-3, atol=1e-4)
