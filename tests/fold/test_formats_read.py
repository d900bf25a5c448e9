"""Adapters that other tools wrote, folded: each is compared with a dense product in float64, or with stock PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rankfold.algebra import combine, diff
from rankfold.errors import RankfoldError
from rankfold.fold import fold_adapter, read_source
from rankfold.inspect import inspect_adapter
from rankfold.kernel.factors import Factors

TOKENS = torch.arange(5, 21)[None]
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64,
}  # fmt: skip
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bases") / "llama"
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of stock PEFT, with a scale and ranks that differ."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM",
        rank_pattern={"layers.1.self_attn.q_proj": 3}, alpha_pattern={"k_proj": 5},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config).save_pretrained(folder)
    return folder


def logits(base: Path, adapter: Path) -> Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return model(TOKENS).logits


def delta(adapter: Path, module: str, base: str | None = None) -> Tensor:
    update = read_source(adapter, base).update(module)
    assert isinstance(update, Factors)
    return update.delta()


def test_a_pickled_adapter(llama: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    torch.save(load_file(adapter / "adapter_model.safetensors"), tmp_path / "bin" / "adapter_model.bin")
    (tmp_path / "bin" / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    report = fold_adapter(tmp_path / "bin", tmp_path / "out", dtype="float32")
    assert report.probe["max_logit_error"] < 1e-5  # type: ignore[operator]
    torch.testing.assert_close(logits(llama, tmp_path / "out"), logits(llama, adapter), rtol=1e-5, atol=1e-5)
    assert diff(adapter, tmp_path / "bin").whole.distance < 1e-12


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_a_renamed_file_of_peft_is_not_taken_for_another_tools(prefix: str, adapter: Path, tmp_path: Path) -> None:
    """Without PEFT's prefix its names look like those of diffusers, where the scale is 1."""
    found = load_file(adapter / "adapter_model.safetensors")
    file = tmp_path / "my_lora.safetensors"
    save_file({key.replace("base_model.model.", prefix): tensor for key, tensor in found.items()}, file)
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    with pytest.raises(RankfoldError, match=r"no weights of this name; call it adapter_model\.safetensors, and put"):
        fold_adapter(file, tmp_path / "out")
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(RankfoldError, match=r"call it adapter_model\.safetensors,? and put"):
        fold_adapter(file, tmp_path / "out")


@pytest.mark.parametrize("profile", ["mlx", "gguf"])
def test_a_fold_for_another_tool_is_read_back(profile: str, llama: Path, adapter: Path, tmp_path: Path) -> None:
    if profile == "gguf":
        pytest.importorskip("gguf")
    fold_adapter(adapter, tmp_path / "there", profile=profile, dtype="float32", probe=False)
    paths = [tmp_path / "there", *(tmp_path / "there").glob("*.gguf")]
    report = fold_adapter(paths[-1], tmp_path / "back", base=str(llama), dtype="float32")
    assert report.probe["max_logit_error"] < 1e-5  # type: ignore[operator]
    torch.testing.assert_close(logits(llama, tmp_path / "back"), logits(llama, adapter), rtol=1e-5, atol=1e-5)
    for path in paths:
        found = diff(adapter, path, base=str(llama))
        assert found.whole.distance < 1e-6 * found.whole.norm_a
    inspected = inspect_adapter(paths[-1], base=str(llama))
    assert {m.module: m.rank for m in inspected.updates}[Q] == 3
    half = combine([adapter, paths[-1]], tmp_path / "half", weights=[0.25, 0.25], base=str(llama), dtype="float32")
    assert half.rank == 8
    torch.testing.assert_close(delta(tmp_path / "half", DOWN) * 2, delta(adapter, DOWN), rtol=1e-5, atol=1e-7)


def mlx(folder: Path, kind: str = "lora", scale: float = 20.0, **more: Any) -> dict[str, Tensor]:
    folder.mkdir(exist_ok=True)
    shapes = {Q: (32, 32), DOWN: (32, 48)}
    tensors = {}
    for name, (out, into) in shapes.items():
        tensors |= {f"{name}.lora_a": torch.randn(into, 4), f"{name}.lora_b": torch.randn(4, out)}
        if kind == "dora":
            tensors[f"{name}.m"] = torch.rand(out) + 0.5
    save_file(tensors, folder / "adapters.safetensors")
    parameters = {"rank": 4, "scale": scale, "dropout": 0.0, **more}
    config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def test_an_adapter_of_mlx(llama: Path, tmp_path: Path) -> None:
    """y = x Wᵀ + scale · (x lora_a) lora_b."""
    tensors = mlx(tmp_path / "mlx")
    report = fold_adapter(tmp_path / "mlx", tmp_path / "out", base=str(llama), dtype="float32")
    assert report.probe["max_logit_error"] < 1e-3  # type: ignore[operator]
    x = torch.randn(5, 32, dtype=torch.float64)
    expected = 20 * (x @ tensors[f"{Q}.lora_a"].double()) @ tensors[f"{Q}.lora_b"].double()
    torch.testing.assert_close(x @ delta(tmp_path / "mlx", Q, str(llama)).T, expected)
    torch.testing.assert_close(x @ delta(tmp_path / "out", Q).T, expected, rtol=1e-5, atol=1e-4)
    assert "scale 20" in " ".join(report.notes)


def test_a_dora_of_mlx(llama: Path, tmp_path: Path) -> None:
    """y = (m / ‖W + scale · BA‖ by row) · x (W + scale · BA)ᵀ."""
    tensors = mlx(tmp_path / "mlx", "dora", scale=2.0)
    fold_adapter(tmp_path / "mlx", tmp_path / "out", base=str(llama), dtype="float32", rank=32, probe=False)
    weight = load_file(llama / "model.safetensors")[f"{Q}.weight"].double()
    adapted = weight + 2 * (tensors[f"{Q}.lora_a"] @ tensors[f"{Q}.lora_b"]).double().T
    expected = adapted * (tensors[f"{Q}.m"].double() / adapted.norm(dim=1))[:, None] - weight
    torch.testing.assert_close(delta(tmp_path / "out", Q), expected, rtol=1e-4, atol=1e-5)


def test_what_of_mlx_is_refused(llama: Path, tmp_path: Path) -> None:
    for kind, more, message in (
        ("full", {}, r"holds whole weights and no LoRA; .*rankfold extract"),
        ("prompt", {}, "fine_tune_type='prompt' must be"),
        ("lora", {"alpha": 16}, r"alpha=16: old versions.*scale·alpha/rank = 20.0·16/4"),  # mlx-lm 0.10's default
        ("lora", {"scale": "20"}, "must hold scale, a number"),
    ):
        mlx(tmp_path / "mlx", kind, **more)
        with pytest.raises(RankfoldError, match=message):
            fold_adapter(tmp_path / "mlx", tmp_path / "out", base=str(llama))
    tensors = mlx(tmp_path / "mlx")
    for changed, message in (
        ({**tensors, "model.norm.weight": torch.ones(32)}, "not pairs of lora_a and lora_b: model.norm.weight"),
        ({k: v for k, v in tensors.items() if k != f"{Q}.lora_b"}, "not pairs"),
        ({f"{Q}.lora_a": torch.ones(4), f"{Q}.lora_b": torch.ones(4, 32)}, "only those of linear layers"),
        ({f"{Q}.lora_a": torch.ones(32, 0), f"{Q}.lora_b": torch.ones(0, 32)}, "not of one rank above 0"),
        ({f"{Q}.lora_a": torch.ones(4, 4, 32), f"{Q}.lora_b": torch.ones(4, 32, 4)}, "fused experts"),
    ):
        save_file(changed, tmp_path / "mlx" / "adapters.safetensors")
        with pytest.raises(RankfoldError, match=message):
            fold_adapter(tmp_path / "mlx", tmp_path / "out", base=str(llama))
    mlx(tmp_path / "mlx")
    other = {k.replace("model.", "decoder."): v for k, v in tensors.items()}
    save_file(other, tmp_path / "mlx" / "adapters.safetensors")
    with pytest.raises(RankfoldError, match=r"lacks 4 of the 4 tensors|not in the base|has no module"):
        fold_adapter(tmp_path / "mlx", tmp_path / "out", base=str(llama))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_gguf_lora(family: str, kind: str, tmp_path: Path) -> None:
    """Scales are alpha over each tensor's rank; a llama's rows of q and k alternate the halves that the rotary embedding pairs."""
    gguf = pytest.importorskip("gguf")
    if family == "llama":
        LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path / "base")
    else:
        Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8)).save_pretrained(tmp_path / "base")
    down, up = torch.randn(2, 32), torch.randn(16, 2)
    dense = up.double() @ down.double()
    rows = up.view(2, 2, 4, 2).transpose(1, 2).reshape(16, 2) if family == "llama" else up  # 2 heads of 8
    stored = {"blk.1.attn_k.weight": (down, rows), "blk.0.ffn_down.weight": (torch.randn(32, 48), torch.randn(32, 32))}
    path = tmp_path / "lora.gguf"
    writer = gguf.GGUFWriter(path, family)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 6.0)
    for name, pair in stored.items():
        for side, tensor in zip("ab", pair, strict=True):
            # ranks that are not a multiple of 32 stay float, as the converter leaves them
            to = gguf.GGMLQuantizationType[kind if tensor.shape[1] % 32 == 0 else "F32"]
            writer.add_tensor(f"{name}.lora_{side}", gguf.quantize(tensor.numpy(), to), raw_dtype=to)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    found = delta(path, "model.layers.1.self_attn.k_proj", str(tmp_path / "base"))
    assert (found - 3 * dense).norm() < (1e-6 if kind == "F32" else 1e-2) * 3 * dense.norm()
    with pytest.raises(RankfoldError, match="give the base with --base"):
        fold_adapter(path, tmp_path / "out")
    wide = {**SMALL, "hidden_size": 64, "head_dim": 16}
    (Qwen3Config(**wide) if family == "qwen3" else LlamaConfig(**wide)).save_pretrained(tmp_path / "wide")
    with pytest.raises(RankfoldError, match=r"rows and the layer of base=.*; give the base it was trained on"):
        fold_adapter(path, tmp_path / "out", base=str(tmp_path / "wide"))
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:-300])
    with pytest.raises(RankfoldError, match=r"truncated|cannot be read"):
        fold_adapter(tmp_path / "cut.gguf", tmp_path / "out", base=str(tmp_path / "base"))


def diffusion(
    path: Path, names: dict[str, tuple[int, int]], down: str, up: str, alpha: float | None
) -> dict[str, Tensor]:
    tensors = {}
    for name, (out, into) in names.items():
        tensors |= {f"{name}.{down}.weight": torch.randn(2, into), f"{name}.{up}.weight": torch.randn(out, 2)}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return tensors


UNET = {"down_blocks.0.attn.to_q": (8, 8), "down_blocks.0.ff.net.0.proj": (16, 8), "mid_block.to_out.0": (8, 8)}


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    """A model that transformers does not know: its names are those in its file."""
    folder = tmp_path / "unet"
    folder.mkdir()
    save_file({f"{n}.weight": torch.ones(s) for n, s in UNET.items()}, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    return folder


@pytest.mark.parametrize("tool", ["kohya", "kohya, no alpha", "diffusers", "diffusers, old", "diffusers, config"])
def test_a_lora_of_a_diffusion_model(tool: str, unet: Path, tmp_path: Path) -> None:
    file = tmp_path / "any name.safetensors"
    kohya, alpha = tool.startswith("kohya"), 3.0 if tool == "kohya" else None
    prefixed = {f"lora_unet_{n.replace('.', '_')}" if kohya else f"unet.{n}": s for n, s in UNET.items()}
    down, up = (
        ("lora_down", "lora_up") if kohya else ("lora.down", "lora.up") if "old" in tool else ("lora_A", "lora_B")
    )
    tensors = diffusion(file, prefixed, down, up, alpha)
    if "config" in tool:
        stated = {"unet.r": 2, "unet.lora_alpha": 3, "unet.target_modules": ["to_q"]}
        save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(stated)})
    scale = 1.5 if alpha or "config" in tool else 1.0
    report = fold_adapter(file, tmp_path / "out", base=str(unet) if kohya else None, dtype="float32", pad="none")
    assert len(report.layers) == 3
    for (key, _), name in zip(prefixed.items(), UNET, strict=True):
        expected = scale * tensors[f"{key}.{up}.weight"].double() @ tensors[f"{key}.{down}.weight"].double()
        torch.testing.assert_close(delta(tmp_path / "out", name), expected, rtol=1e-5, atol=1e-6)


class Unet(torch.nn.Module):
    """The modules of `UNET`, for stock PEFT."""

    def __init__(self) -> None:
        super().__init__()
        for name, (out, into) in UNET.items():
            *parents, last = name.split(".")
            at: torch.nn.Module = self
            for part in parents:
                if part not in dict(at.named_children()):
                    at.add_module(part, torch.nn.Module())
                at = at.get_submodule(part)
            at.add_module(last, torch.nn.Linear(into, out, bias=False))


def test_stock_peft_loads_a_folded_kohya_file(unet: Path, tmp_path: Path) -> None:
    names = {f"lora_unet_{n.replace('.', '_')}": s for n, s in UNET.items()}
    tensors = diffusion(tmp_path / "lora.safetensors", names, "lora_down", "lora_up", 1.0)
    fold_adapter(tmp_path / "lora.safetensors", tmp_path / "out", base=str(unet), dtype="float32")
    model = Unet()
    before = {n: p.clone() for n, p in model.named_parameters()}
    merged = PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload()  # type: ignore[arg-type]
    for name in UNET:
        key = f"lora_unet_{name.replace('.', '_')}"
        expected = 0.5 * tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
        torch.testing.assert_close(merged.get_parameter(f"{name}.weight") - before[f"{name}.weight"], expected, rtol=1e-4, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("tool", ["kohya", "diffusers"])
def test_convolutions_of_a_diffusion_model(tool: str, tmp_path: Path) -> None:
    """Of a k×k kernel and of a 1×1 one, beside a linear layer of another rank; stock PEFT loads the fold."""
    torch.manual_seed(0)
    sizes = {"down.conv": (6, 4, 3), "down.proj_in": (4, 6, 1), "down.to_q": (4, 4, 0)}
    kohya = tool == "kohya"
    ends = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
    tensors: dict[str, Tensor] = {}
    for name, (out, into, k) in sizes.items():
        key, r = f"lora_unet_{name.replace('.', '_')}" if kohya else f"unet.{name}", 3 if k else 2
        tensors[f"{key}.{ends[0]}.weight"] = torch.randn(r, into, *[k, k] * bool(k))
        tensors[f"{key}.{ends[1]}.weight"] = torch.randn(out, r, *[1, 1] * bool(k))
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    base = tmp_path / "unet"
    base.mkdir()
    down = torch.nn.Module()
    for name, (out, into, k) in sizes.items():
        layer = torch.nn.Conv2d(into, out, k, padding=k // 2) if k else torch.nn.Linear(into, out)
        down.add_module(name.removeprefix("down."), layer)
    model = torch.nn.Module()
    model.add_module("down", down)
    save_file(model.state_dict(), base / "diffusion_pytorch_model.safetensors")
    fold_adapter(tmp_path / "lora.safetensors", tmp_path / "out", base=str(base) if kohya else None, dtype="float32")
    before = {n: p.clone() for n, p in model.named_parameters()}
    merged = PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload()  # type: ignore[arg-type]
    for name, (_, _, k) in sizes.items():
        key, r = f"lora_unet_{name.replace('.', '_')}" if kohya else f"unet.{name}", 3 if k else 2
        first, second = (tensors[f"{key}.{end}.weight"].flatten(1) for end in ends)
        found = merged.get_parameter(f"{name}.weight") - before[f"{name}.weight"]
        torch.testing.assert_close(found.flatten(1), second @ first / r, rtol=1e-4, atol=1e-5)


def test_a_module_whose_name_ends_another_keeps_its_own_scale(tmp_path: Path) -> None:
    """Flux has `proj_out` and `blocks.N.proj_out`."""
    file = tmp_path / "pytorch_lora_weights.safetensors"
    found: dict[str, Tensor] = {}
    for name, rank, alpha in (("proj_out", 2, 1.0), ("blocks.0.proj_out", 4, 8.0), ("blocks.0.to_q", 4, 8.0)):
        down, up = torch.randn(rank, 8), torch.randn(8, rank)
        found |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
        found[f"transformer.{name}.alpha"] = torch.tensor(alpha)
    save_file(found, file)
    fold_adapter(file, tmp_path / "out", dtype="float32")
    for name, scale in (("proj_out", 0.5), ("blocks.0.proj_out", 2.0), ("blocks.0.to_q", 2.0)):
        up, down = (found[f"transformer.{name}.lora_{side}.weight"].double() for side in "BA")
        torch.testing.assert_close(delta(tmp_path / "out", name), scale * up @ down, rtol=1e-5, atol=1e-6)


def test_a_file_of_two_models(unet: Path, tmp_path: Path) -> None:
    """Kohya's scripts put the text encoder's LoRA beside the UNet's; a fold is of the one that --base names."""
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )
    text.save_pretrained(tmp_path / "text")
    q = next(n for n, _ in text.named_modules() if n.endswith("self_attn.q_proj"))
    names = {f"lora_unet_{n.replace('.', '_')}": s for n, s in UNET.items()}
    names |= {f"lora_te_{q.replace('.', '_')}": (16, 16)}
    file = tmp_path / "lora.safetensors"
    tensors = diffusion(file, names, "lora_down", "lora_up", 1.0)
    with pytest.raises(RankfoldError, match=r"LoRAs of 2 models \(lora_te, lora_unet\).*--base FOLDER"):
        fold_adapter(file, tmp_path / "out")
    report = fold_adapter(file, tmp_path / "out", base=str(tmp_path / "text"), dtype="float32")
    assert [p.module for p in report.layers] == [q]
    assert any(n.startswith("left out: the LoRAs of lora_unet") for n in report.notes)
    key = f"lora_te_{q.replace('.', '_')}"
    expected = 0.5 * tensors[f"{key}.lora_up.weight"].double() @ tensors[f"{key}.lora_down.weight"].double()
    torch.testing.assert_close(delta(tmp_path / "out", q), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tool", ["kohya", "diffusers", "diffusers, config"])
def test_a_text_encoder_by_the_names_that_tools_have(tool: str, tmp_path: Path) -> None:
    """In transformers 5 a CLIPTextModel has no text_model in front; in every file of kohya and diffusers it does."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPTextModel(CLIPTextConfig(**small)).save_pretrained(tmp_path / "text")
    new, old = "encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.self_attn.q_proj"
    key = f"lora_te_{old.replace('.', '_')}" if tool == "kohya" else f"text_encoder.{old}"
    file = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = diffusion(file, {key: (16, 16)}, "lora_down", "lora_up", None if "config" in tool else 3.0)
    if "config" in tool:
        stated = {"r": 4, "lora_alpha": 8, "rank_pattern": {old: 2}, "alpha_pattern": {old: 3}}
        stated = {f"text_encoder.{k}": v for k, v in stated.items()}
        save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(stated)})
    report = fold_adapter(file, tmp_path / "out", base=str(tmp_path / "text"), dtype="float32")
    assert [p.module for p in report.layers] == [new]
    expected = 1.5 * tensors[f"{key}.lora_up.weight"].double() @ tensors[f"{key}.lora_down.weight"].double()
    torch.testing.assert_close(delta(tmp_path / "out", new), expected, rtol=1e-5, atol=1e-6)


def test_what_of_diffusion_is_refused(unet: Path, llama: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "lora.safetensors", tmp_path / "out"
    names = {f"lora_unet_{n.replace('.', '_')}": s for n, s in UNET.items()}
    tensors = diffusion(file, names, "lora_down", "lora_up", 1.0)
    with pytest.raises(RankfoldError, match="do not say where the module's name has dots; give the folder"):
        fold_adapter(file, out)
    with pytest.raises(RankfoldError, match="lacks 3 of the 3 modules of lora_unet"):
        fold_adapter(file, out, base=str(llama))
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(RankfoldError, match="is a pipeline of several models; give one of them"):
        fold_adapter(file, out, base=str(tmp_path))
    key = "lora_unet_mid_block_to_out_0"
    for changes, message in (
        ({f"{key}.lora_mid.weight": torch.ones(2, 2)}, r"not of a plain LoRA \(lora_mid\)"),
        ({f"{key}.hada_w1_a": torch.ones(2, 2)}, r"\(hada"),
        ({f"{key}.dora_scale": torch.ones(8, 1)}, r"\(dora_scale\)"),
        ({f"{key}.lora_down.weight": torch.ones(2, 8, 1, 1)}, "only those of linear layers and of convolutions"),
        ({f"{key}.lora_down.weight": torch.ones(3, 8)}, "not of one rank"),
        ({f"{key}.alpha": torch.ones(3)}, r"has the shape \(3,\); it must be one number"),
        ({f"{key}.lora_up.weight": None}, "lacks the other factor"),
    ):
        changed = {**tensors, **changes}
        save_file({k: v for k, v in changed.items() if v is not None}, file)
        with pytest.raises(RankfoldError, match=message):
            fold_adapter(file, out, base=str(unet))
    save_file(tensors, file)
    clash = {"mid.block.weight": torch.ones(8, 8), "mid_block.weight": torch.ones(8, 8)}
    save_file(clash, unet / "diffusion_pytorch_model.safetensors")
    with pytest.raises(RankfoldError, match=r"do not tell its modules mid.block and mid_block apart"):
        fold_adapter(file, out, base=str(unet))
    assert not out.exists()
