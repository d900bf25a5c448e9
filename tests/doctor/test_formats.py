"""Formats that are not PEFT's: mlx-lm, diffusers, GGUF."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankfold.doctor import Diagnosis, diagnose

MLX = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}}


def status(found: Diagnosis) -> dict[str, str]:
    return {v.engine.key: str(v.status) for v in found.verdicts if v.status != "does not apply"}


def why(found: Diagnosis) -> str:
    return " | ".join(f.what for v in found.verdicts for f in v.findings)


def mlx(folder: Path, rank: int = 4, **changes) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps({**MLX, **changes}))
    name = "model.layers.0.self_attn.q_proj.lora_"
    save_file({name + "a": torch.ones(32, rank), name + "b": torch.ones(rank, 32)}, folder / "adapters.safetensors")
    return folder


def test_mlx(tmp_path: Path):
    found = diagnose(mlx(tmp_path))
    assert status(found) == {"mlx": "loads", "ollama": "loads but mis-scaled"}  # Ollama does not read scale
    assert diagnose(tmp_path, engines=["mlx"]).healthy
    assert status(diagnose(tmp_path / "adapters.safetensors"))["mlx"] == "loads"
    found = diagnose(mlx(tmp_path, rank=8))
    assert status(found)["mlx"] == "refused"
    assert status(diagnose(mlx(tmp_path, rank=8, fine_tune_type="full")))["mlx"] == "refused"  # factors, not weights
    assert "lora_parameters.rank=4, but model.layers.0.self_attn.q_proj has rank 8" in why(found)
    assert "needs num_layers" in why(diagnose(mlx(tmp_path, num_layers=None)))
    assert "needs lora_parameters" in why(diagnose(mlx(tmp_path, lora_parameters=[])))


@pytest.mark.parametrize(
    ("layers", "keys", "status"),
    [
        (-1, None, "loads"),  # mlx_lm takes layers[-max(n, 0):], which is all of them
        (0, None, "loads"),
        (99, None, "loads"),
        (2, None, "refused"),
        (1, ["model.layers.0.self_attn.q_proj"], "loads"),
        (-1, ["self_attn.q_proj"], "loads"),
        (-1, ["q_proj"], "refused"),
    ],
)
def test_which_layers_mlx_adapts(layers: int, keys: list[str] | None, status: str, llama: Path, tmp_path: Path):
    numbers = {**MLX["lora_parameters"], **({"keys": keys} if keys else {})}
    found = diagnose(mlx(tmp_path, num_layers=layers, lora_parameters=numbers), base=llama, engines=["mlx"])
    assert [str(v.status) for v in found.verdicts] == [status]


def test_dora_of_mlx(tmp_path: Path):
    mlx(tmp_path, fine_tune_type="dora", lora_parameters={**MLX["lora_parameters"], "scale": 1.0})
    tensors = load_file(tmp_path / "adapters.safetensors")
    save_file({**tensors, "model.layers.0.self_attn.q_proj.m": torch.ones(32)}, tmp_path / "adapters.safetensors")
    assert status(diagnose(tmp_path)) == {"mlx": "loads", "ollama": "refused"}  # whose loader knows no such suffix
    (tmp_path / "adapter_config.json").write_text(json.dumps(MLX))
    assert status(diagnose(tmp_path))["mlx"] == "refused"


def diffusers(path: Path, *ranks: int, alpha: bool = False) -> Path:
    tensors = {}
    for i, r in enumerate(ranks):
        tensors[f"unet.down_blocks.{i}.to_q.lora.down.weight"] = torch.ones(r, 8)
        tensors[f"unet.down_blocks.{i}.to_q.lora.up.weight"] = torch.ones(8, r)
        if alpha:
            tensors[f"unet.down_blocks.{i}.to_q.alpha"] = torch.tensor(float(r))
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "my-style.safetensors"])
def test_diffusers(tmp_path: Path, name: str):
    found = diagnose(diffusers(tmp_path / name, 4, 4))
    assert status(found) == {"diffusers": "loads"}
    assert found.healthy
    found = diagnose(diffusers(tmp_path / name, 4, 8))
    assert status(found) == {"diffusers": "not checked"}
    assert "ranks from 4 to 8 without alphas" in why(found)
    assert status(diagnose(diffusers(tmp_path / name, 4, 8, alpha=True))) == {"diffusers": "loads"}


def test_dora_of_diffusers_is_filtered_out(tmp_path: Path):
    file = diffusers(tmp_path / "pytorch_lora_weights.safetensors", 4)
    save_file({**load_file(file), "unet.down_blocks.0.to_q.dora_scale": torch.ones(8)}, file)
    assert status(diagnose(file)) == {"diffusers": "loads in part"}


def gguf_file(path: Path, *ranks: int, kind: str = "adapter", alpha: float | None = 8.0, extra: str = "") -> Path:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_array("some.list", [1, 2, 3])
    for i, r in enumerate(ranks):
        writer.add_tensor(f"blk.{i}.attn_q.weight.lora_a", torch.ones(r, 16).numpy())
        writer.add_tensor(f"blk.{i}.attn_q.weight.lora_b", torch.full((16, r), 0.5).half().numpy())
    if extra:
        writer.add_tensor(extra, torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf(tmp_path: Path):
    path = tmp_path / "lora.gguf"
    found = diagnose(gguf_file(path, 8, 8))
    assert status(found) == {"llama.cpp": "loads", "ollama": "loads"}
    assert found.healthy
    assert "2 modules, rank 8, F16, F32" in found.summary
    assert status(diagnose(tmp_path)) == status(found)  # the only one in its folder

    assert "every scale is 1" in why(diagnose(gguf_file(path, 8, alpha=None)))
    assert "general.type='model' must be 'adapter'" in why(diagnose(gguf_file(path, 8, kind="model")))
    assert "output.weight" in why(diagnose(gguf_file(path, 8, extra="output.weight")))
    assert status(diagnose(gguf_file(path, 8, extra="blk.0.attn_norm.weight"))) == status(found)
    lone = diagnose(gguf_file(path, 8, extra="blk.9.ffn_up.weight.lora_a"))
    assert status(lone)["llama.cpp"] == "refused"


def test_a_ggufs_ranks_hide_what_scale_was_meant(tmp_path: Path):
    found = diagnose(gguf_file(tmp_path / "lora.gguf", 16, 13, alpha=1.0))
    assert "scales from 0.0625 to 0.07692" in found.findings[0].what


def test_a_ggufs_numbers_are_looked_at(tmp_path: Path):
    path = gguf_file(tmp_path / "lora.gguf", 8)
    data = bytearray(path.read_bytes())
    data[-2:] = b"\x00\x7e"  # NaN in float16
    path.write_bytes(data)
    assert "NaN" in diagnose(path).problems[0].what
    path.write_bytes(data[:-64])
    assert "truncated" in diagnose(path).problems[0].what


def test_a_safetensors_of_something_else(tmp_path: Path):
    save_file({"model.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    found = diagnose(tmp_path / "model.safetensors")
    assert "do not belong in a LoRA" in " ".join(f.what for f in found.problems)
