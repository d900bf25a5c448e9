"""Promise 3 on the disk, for every method: each profile of `rankfold fold` gives the trained adapter's logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import BERT, GPT2, LLAMA, Arch
from peft import PeftModel
from table import (
    FIRST,
    Row,
    adapt,
    first_rows,
    layers,
    on,
    second,
    spread,
)

from rankfold.doctor import diagnose
from rankfold.fold import fold_model, fold_state_dict


def based(arch: Arch, row: Row, folder: Path, **changes: object) -> PeftModel:
    """An adapted model whose base lies in a folder, as a fold's base must."""
    arch.build().save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    model = adapt(arch, row, **changes)  # pyright: ignore[reportArgumentType]
    model.peft_config["default"].base_model_name_or_path = str(folder)
    if model.peft_config["default"].schedule is None:
        model.peft_config["default"].allow_unscheduled = True  # pyright: ignore[reportAttributeAccessIssue]
    return model


def loaded(arch: Arch, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(arch.build(), str(folder)).eval()  # pyright: ignore[reportArgumentType]


@spread(arch=[LLAMA, GPT2, BERT], profile=["uniform", "compact"])
def test_stock_peft_gives_the_same_logits(arch: Arch, profile: str, row: Row, tmp_path: Path) -> None:
    model = based(arch, row, tmp_path / "base")
    report = fold_model(model, tmp_path / "out", profile=profile)
    torch.testing.assert_close(arch.out(loaded(arch, tmp_path / "out")), arch.out(model), rtol=1e-4, atol=1e-5)
    assert report.worst.frobenius < 1e-6
    assert report.worst_of("algebra") < 1e-13
    if arch is LLAMA and profile == "uniform":
        assert diagnose(str(tmp_path / "out"), str(tmp_path / "base"), ["vllm", "sglang", "tgi", "peft"]).healthy


@on(LLAMA, GPT2)
def test_in_memory_it_is_the_update(arch: Arch, row: Row) -> None:
    """What `fold_state_dict` gives is each layer's own delta, its scale by `set_scale` included."""
    model = adapt(arch, row, allow_unscheduled=True)
    for layer in layers(model).values():
        layer.scale_layer(0.5)
    lora = fold_state_dict(model)
    for name, layer in layers(model).items():
        key = f"base_model.model.{name.removeprefix('base_model.model.')}.lora_"
        delta = lora[key + "B.weight"] @ lora[key + "A.weight"]
        expected = layer.kind.as_matrix(layer.get_delta_weight("default"))
        torch.testing.assert_close(delta, expected.to(delta.dtype), rtol=1e-4, atol=1e-5)


@first_rows
def test_merged(row: Row, tmp_path: Path) -> None:
    model = based(LLAMA, row, tmp_path / "base")
    fold_model(model, tmp_path / "out", profile="merged")
    merged = type(LLAMA.build()).from_pretrained(tmp_path / "out")  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(LLAMA.out(merged), LLAMA.out(model), rtol=1e-4, atol=1e-5)


@spread(FIRST, profile=["gguf", "mlx"])
def test_files_that_are_not_for_python_read_back(profile: str, row: Row, tmp_path: Path) -> None:
    """fold_model compares what it reads back from the disk with what it wrote, and would raise."""
    pytest.importorskip("gguf")
    report = fold_model(based(LLAMA, row, tmp_path / "base"), tmp_path / "out", profile=profile)
    assert report.worst.frobenius < 1e-6


@first_rows
def test_compressed_to_its_own_rank_and_below(row: Row, tmp_path: Path) -> None:
    model = based(LLAMA, row, tmp_path / "base")
    whole = fold_model(model, tmp_path / "whole", pad="none")
    same = fold_model(model, tmp_path / "same", rank=whole.needed_rank)
    assert same.worst_of("truncation") < 1e-12
    less = fold_model(model, tmp_path / "less", rank=1)
    assert less.needed_rank == 1
    assert 0 < less.worst_of("truncation") < 1
    near = fold_model(model, tmp_path / "near", error=0.3)
    assert near.worst_of("truncation") <= 0.3


@first_rows
def test_one_of_two_adapters(row: Row, tmp_path: Path) -> None:
    model = based(LLAMA, row, tmp_path / "base")
    second(model, LLAMA, row)
    model.peft_config["other"].allow_unscheduled = True  # pyright: ignore[reportAttributeAccessIssue]
    fold_model(model, tmp_path / "out", adapter_name="other")
    model.set_adapter("other")
    torch.testing.assert_close(LLAMA.out(loaded(LLAMA, tmp_path / "out")), LLAMA.out(model), rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"
