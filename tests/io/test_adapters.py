"""Which folder an adapter's path means, and what its config and tensors may be."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

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


class Bomb:
    """What a pickle may hold: a call that runs when it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_of_tensors_is_read_and_no_other(adapter: Path, tmp_path: Path) -> None:
    weights = adapter / "adapter_model.bin"
    tensors = read_tensors(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, weights)
    assert all(torch.equal(found, tensors[key]) for key, found in read_tensors(adapter).items())
    for content, message in (
        ({**tensors, "bomb": Bomb(tmp_path / "boom")}, r"not a pickle of tensors alone.*weights_only=False"),
        ({"state_dict": tensors}, "must hold a dict of tensors"),
        (list(tensors.values()), "must hold a dict of tensors"),
    ):
        torch.save(content, weights)
        with pytest.raises(RankfoldError, match=message):
            read_tensors(adapter)
    for content in (b"", b"PK", pickle.dumps({"bomb": Bomb(tmp_path / "boom")}), b"\x80\x04nonsense"):
        weights.write_bytes(content)
        with pytest.raises(RankfoldError, match=r"cannot be read|not a pickle of tensors"):
            read_tensors(adapter)
    assert not (tmp_path / "boom").exists()
