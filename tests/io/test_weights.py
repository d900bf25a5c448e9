"""Headers and single tensors of safetensors, of a file and of a model that is split over several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaModel, ViTConfig, ViTForImageClassification

from rankfold.errors import RankfoldError
from rankfold.io.weight_names import in_files
from rankfold.io.weights import (
    Header,
    read_headers,
    read_metadata,
    read_tensor,
    read_tensors,
    weight_files,
    weight_reader,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two files and an index, one module with the prefix of a base model and one without."""
    parts = {
        "one.safetensors": {"model.a.weight": torch.arange(6.0).view(2, 3)},
        "two.safetensors": {"head.weight": torch.ones(4, 2, dtype=torch.bfloat16), "i.weight": torch.ones(2, 2).int()},
    }
    index = {name: file for file, tensors in parts.items() for name in tensors}
    for file, tensors in parts.items():
        save_file(tensors, tmp_path / file, metadata={"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return tmp_path


def test_headers_and_tensors(model: Path) -> None:
    file = model / "two.safetensors"
    assert read_headers(file) == {"head.weight": Header((4, 2), "BF16"), "i.weight": Header((2, 2), "I32")}
    assert read_metadata(file) == {"format": "pt"}
    assert torch.equal(read_tensor(model / "one.safetensors", "model.a.weight"), torch.arange(6.0).view(2, 3))
    assert [name for name, _ in read_tensors(file)] == list(read_headers(file))
    with pytest.raises(RankfoldError, match="'nothing' cannot be read"):
        read_tensor(file, "nothing")


def test_what_a_reader_reads_and_refuses(model: Path) -> None:
    read = weight_reader(str(model), None, nn.Module())
    assert read("model.a").shape == (2, 3)
    assert read("head").shape == (4, 2)
    with pytest.raises(RankfoldError, match=r"no tensor 'b\.weight'"):
        read("b")
    with pytest.raises(RankfoldError, match=r"is torch\.int32; give the unquantised base"):
        read("i")
    with pytest.raises(RankfoldError, match="give the base with --base"):
        weight_reader(None, None, nn.Module())("a")
    (model / "empty").mkdir()
    with pytest.raises(RankfoldError, match=r"no model\.safetensors here.*--base FOLDER with safetensors"):
        weight_reader(str(model / "empty"), None, nn.Module())("a")


def test_names_are_those_of_transformers_table() -> None:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**small, image_size=8, patch_size=4)
    old = "vit.encoder.layer.0.attention.attention.query.weight"
    with torch.device("meta"):
        model = ViTForImageClassification(config)
        bare = LlamaModel(LlamaConfig(**small, vocab_size=8))
    found = in_files(model, [old])
    assert next(iter(found)) in model.state_dict()
    assert in_files(bare, ["model.layers.0.self_attn.q_proj.weight"]) == {
        "layers.0.self_attn.q_proj.weight": ["model.layers.0.self_attn.q_proj.weight"]
    }


def test_damaged_models(model: Path) -> None:
    save_file({"other": torch.ones(1)}, model / "one.safetensors")
    with pytest.raises(RankfoldError, match=r"model\.a\.weight is in one\.safetensors, but it is not"):
        weight_files(model)
    (model / "one.safetensors").write_bytes(b"torn")
    with pytest.raises(RankfoldError, match="missing, truncated or not safetensors"):
        weight_files(model)
    for text in ("{", "[]", '{"weight_map": [1]}'):
        (model / "model.safetensors.index.json").write_text(text)
        with pytest.raises(RankfoldError, match="is not a valid index"):
            weight_files(model)
    (model / "model.safetensors.index.json").unlink()
    with pytest.raises(RankfoldError, match=r"has no model\.safetensors and no index"):
        weight_files(model)
