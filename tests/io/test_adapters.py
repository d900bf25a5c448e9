"""Which folder an adapter's path means, and what its config and tensors may be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from rankfold.errors import RankfoldError
from rankfold.io.adapters import find_adapter, read_config, read_tensors

KEY = "base_model.model.q_proj.lora_{}.weight"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "adapter"
    LoraConfig(r=2, target_modules=["q_proj"]).save_pretrained(str(folder))
    save_file({KEY.format("A"): torch.ones(2, 3), KEY.format("B"): torch.ones(3, 2)}, folder / "adapter_model.safetensors")  # fmt: skip
    return folder


def test_what_means_the_adapter(adapter: Path) -> None:
    for path in (adapter, adapter.parent, adapter / "adapter_config.json", adapter / "adapter_model.safetensors"):
        assert find_adapter(path) == adapter
    (adapter / "notes.txt").touch()
    for path in (adapter / "notes.txt", adapter.parent / "nothing", adapter.parent.parent):
        assert find_adapter(path) == path


def test_an_adapter_in_a_folder_of_its_name_is_pointed_to(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(RankfoldError, match=r"has no adapter_config\.json; there is one in .*run.adapter$"):
        read_config(adapter.parent)
    with pytest.raises(RankfoldError, match=r"has no adapter_config\.json$"):
        read_config(tmp_path)


def test_float8_is_widened(adapter: Path) -> None:
    narrow = torch.tensor([[0.5, -2.0, 0.0]]).to(torch.float8_e4m3fn)
    save_file({KEY.format("A"): narrow}, adapter / "adapter_model.safetensors")
    (wide,) = read_tensors(adapter).values()
    assert wide.dtype == torch.float32
    assert wide.tolist() == [[0.5, -2.0, 0.0]]


def test_shards_that_were_not_gathered_are_named(adapter: Path) -> None:
    empty = {KEY.format(side): torch.empty(0) for side in "AB"}
    save_file(empty, adapter / "adapter_model.safetensors")
    with pytest.raises(RankfoldError, match=r"2 of 2 tensors are empty .*ZeRO-3.*zero_to_fp32"):
        read_tensors(adapter)


def test_a_pickle_is_not_opened_and_there_is_a_way_on(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(RankfoldError, match=r"never opened; .*save_pretrained\(FOLDER\)"):
        read_tensors(adapter)
