"""PEFT's own LoRA on convolutions, embeddings and parameters, as the input of a fold: live, from its folder, and without a base."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankfold import PlainLoraConfig
from rankfold.algebra.combination import combine
from rankfold.algebra.difference import diff
from rankfold.errors import RankfoldError
from rankfold.fold import fold_adapter, fold_model, fold_state_dict
from rankfold.inspect.adapter import inspect_adapter
from rankfold.plan.cost import cost
from rankfold.plan.folding import Fold

VOCAB = 40
IDS = torch.arange(3, 19).view(2, 8)
close = {"rtol": 1e-4, "atol": 1e-5}
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:.*save_embedding_layers")


class Mixed(nn.Module):
    """One module of each kind that PEFT's LoRA can adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 6, padding_idx=3)
        self.line = nn.Conv1d(6, 8, 3, stride=2, padding=1)
        self.plane = nn.Conv2d(1, 6, (5, 1), padding="same")
        self.space = nn.Conv3d(6, 6, (1, 3, 1), padding="same")
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=4, bias=False)
        self.head = nn.Linear(8, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.grouped(self.line(self.embed(ids).transpose(1, 2)))
        x = self.space(self.plane(x[:, None])[..., None])[..., 0].mean(1)
        return self.head(x.transpose(1, 2))


KINDS = ["embed", "line", "plane", "space", "head"]


def mixed() -> nn.Module:
    torch.manual_seed(0)
    return Mixed().eval()


def small(name: str, **sizes: Any) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    common = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = getattr(hf, MODELS[name][0])(getattr(hf, MODELS[name][1])(**{**common, **sizes, **MODELS[name][2]}))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.2)
    return model.eval()


_TEXT = {"vocab_size": VOCAB, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", {"image_size": 8, "patch_size": 4, "num_labels": 3}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _TEXT),
    "tied": ("LlamaForCausalLM", "LlamaConfig", {**_TEXT, "tie_word_embeddings": True}),
    "wav2vec2": (
        "Wav2Vec2ForCTC", "Wav2Vec2Config",
        {"vocab_size": VOCAB, "conv_dim": [8, 8], "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "pad_token_id": 0, "apply_spec_augment": False},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
        {**_TEXT, "num_experts": 4, "moe_intermediate_size": 12, "head_dim": 8, "num_experts_per_tok": 2},
    ),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**_TEXT, "num_local_experts": 4, "head_dim": 8}),
}  # fmt: skip
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


@torch.no_grad()
def out(model: Any) -> Tensor:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    match type(inner).__name__:
        case "ViTForImageClassification":
            found = inner(torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8))
        case "Wav2Vec2ForCTC":
            found = inner(torch.linspace(-1, 1, 96).view(2, 48).sin())
        case _:
            found = inner(IDS)
    return found if isinstance(found, Tensor) else found.logits


def shake(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_magnitude" in name:
                p.mul_(1 + torch.rand(p.shape, generator=generator))
            elif "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) / 4)
    return model.eval()


def lora(base: nn.Module, **fields: Any) -> PeftModel:
    options: dict[str, Any] = {"r": 4, "lora_alpha": 6, **fields}
    return shake(get_peft_model(base, LoraConfig(**options)))  # pyright: ignore


def saved(name: str, folder: Path, **fields: Any) -> tuple[hf.PreTrainedModel, PeftModel]:
    """A base in folder/base, and an adapter of it in folder/a."""
    small(name).save_pretrained(folder / "base")
    base = type(small(name)).from_pretrained(folder / "base")
    model = lora(base, **fields)
    model.save_pretrained(folder / "a")
    return type(base).from_pretrained(folder / "base").eval(), model


@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True, "rank_pattern": {"line": 3}, "alpha_pattern": {"embed": 1}}]
)
@pytest.mark.parametrize("profile", ["uniform", "compact"])
def test_a_live_model_of_every_kind(profile: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = lora(mixed(), target_modules=KINDS, **fields)
    wanted = out(model)
    assert not torch.allclose(wanted, out(mixed()), atol=1e-2)
    report = fold_model(model, tmp_path / "out", profile=profile)
    assert report.worst.frobenius < 1e-6
    assert {proof.module for proof in report.layers} == set(KINDS)
    assert list(report.serve) == ["PEFT"]
    stock = PeftModel.from_pretrained(mixed(), tmp_path / "out").eval()
    torch.testing.assert_close(out(stock), wanted, **close)
    less = fold_model(model, tmp_path / "less", rank=1, profile=profile)
    assert less.needed_rank == 1
    assert 0 < less.worst_of("truncation") < 1


def test_in_memory() -> None:
    model = lora(mixed(), target_modules=KINDS)
    found = fold_state_dict(model)
    names = ("peft_type", "base_model_name_or_path")
    stock = get_peft_model(mixed(), LoraConfig(**{k: v for k, v in found.config.items() if k not in names}))  # pyright: ignore
    set_peft_model_state_dict(stock, dict(found))
    torch.testing.assert_close(out(stock.eval()), out(model), **close)


EMBEDDING = "an embedding and a head"
FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "a Conv2d": ("vit", {"target_modules": ["projection", "q_proj"]}),
    "a Conv1d": ("wav2vec2", {"target_modules": ["conv_layers.0.conv", "conv_layers.1.conv", "q_proj"]}),
    EMBEDDING: ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_with_its_base(name: str, tmp_path: Path) -> None:
    arch, fields = FOLDERS[name]
    base, model = saved(arch, tmp_path, **fields)
    wanted, before = out(model), out(base)
    assert not torch.allclose(wanted, before, atol=1e-2)
    report = fold_adapter(tmp_path / "a", tmp_path / "out", probe=False)
    assert report.worst.frobenius < 1e-6
    merged = fold_adapter(tmp_path / "a", tmp_path / "merged", profile="merged", probe=False)
    assert merged.worst.frobenius < 1e-5
    torch.testing.assert_close(out(type(base).from_pretrained(tmp_path / "merged").eval()), wanted, **close)
    torch.testing.assert_close(out(PeftModel.from_pretrained(base, tmp_path / "out").eval()), wanted, **close)


@pytest.mark.parametrize("change", [str, lambda k: re.sub(r"\.(lora_(?:embedding_)?[AB])", r".\1.default", k)])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_without_its_base(name: str, change: Callable[[str], str], tmp_path: Path) -> None:
    arch, fields = FOLDERS[name]
    base, model = saved(arch, tmp_path, **fields)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "nowhere/gone"}))
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({change(k): v for k, v in load_file(path).items()}, path)
    report = fold_adapter(tmp_path / "a", tmp_path / "out", dtype="float32")
    assert any("the base was not looked at" in note for note in report.notes)
    torch.testing.assert_close(out(PeftModel.from_pretrained(base, tmp_path / "out").eval()), out(model), **close)
    seen = inspect_adapter(tmp_path / "a")
    assert {u.module for u in seen.updates} == {p.module for p in report.layers}
    assert not seen.left_out
    live = inspect_adapter(model)
    assert {u.module: round(u.norm, 4) for u in live.updates} == {u.module: round(u.norm, 4) for u in seen.updates}


def test_what_does_not_fold_is_still_looked_at() -> None:
    """A trained bias, and a merged adapter, are beside the point there."""
    model = lora(mixed(), target_modules=["line", "head"], bias="lora_only")
    seen = inspect_adapter(model)
    assert {u.module for u in seen.updates} == {"line", "head"}
    assert seen.left_out == ("biases: lora_only",)
    model.merge_adapter()
    assert inspect_adapter(model).updates == seen.updates


def test_a_tied_head_shares_the_embeddings_lora(tmp_path: Path) -> None:
    fields = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    base, model = saved("tied", tmp_path, **fields)
    fold_adapter(tmp_path / "a", tmp_path / "out", probe=False)
    torch.testing.assert_close(out(PeftModel.from_pretrained(base, tmp_path / "out").eval()), out(model), **close)


# DoRA: diag(m/‖W + s·BA‖)(W + s·BA) − W of the weight as a matrix ------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_dora_of_other_kinds(name: str, tmp_path: Path) -> None:
    arch, fields = FOLDERS[name]
    base, model = saved(arch, tmp_path, use_dora=True, **fields)
    wanted = out(model)
    with pytest.raises(RankfoldError, match=r"--error 0\.01"):
        fold_adapter(tmp_path / "a", tmp_path / "out", probe=False)
    report = fold_adapter(tmp_path / "a", tmp_path / "out", error=1e-9, probe=False)
    assert report.worst.frobenius < 2e-6
    torch.testing.assert_close(out(PeftModel.from_pretrained(base, tmp_path / "out").eval()), wanted, **close)
    torch.testing.assert_close(out(model.merge_and_unload()), wanted, **close)  # pyright: ignore


def test_dora_of_a_kernel_of_one_position(tmp_path: Path) -> None:
    """PEFT computes it and cannot merge it (peft 0.21.2)."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv3d(1, 4, 1), nn.Conv3d(4, 2, 1)).eval()

    x = torch.randn(1, 1, 2, 3, 4)
    for dora in (False, True):
        model = lora(build(), target_modules=["0", "1"], use_dora=dora)
        fold_model(model, tmp_path / str(dora), error=1e-9 if dora else None)
        stock = PeftModel.from_pretrained(build(), tmp_path / str(dora)).eval()
        torch.testing.assert_close(stock(x), model(x), **close)


# Parameters -----------------------------------------------------------------------------------------------------

PARAMETERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": BOTH}),
    "qwen3_moe": ("qwen3_moe", {"target_modules": [], "target_parameters": BOTH}),
    "in × out": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": BOTH}),
    "one of two": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
    "a router": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["gate.weight", "experts.gate_up_proj"]},
    ),
    "ranks": ("mixtral", {"target_modules": [], "target_parameters": BOTH, "rank_pattern": {"experts.down_proj": 3}}),
    "a linear's": ("llama", {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]}),
    "by names of old": ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
}


@pytest.mark.filterwarnings("ignore:The following .*:RuntimeWarning", "ignore:Unsupported layer type")  # PEFT's own
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str, tmp_path: Path) -> None:
    arch, fields = PARAMETERS[name]
    base, model = saved(arch, tmp_path, **fields)
    wanted = out(model)
    assert not torch.allclose(wanted, out(base), atol=1e-2)
    report = fold_adapter(tmp_path / "a", tmp_path / "out", probe=False)
    assert report.worst.frobenius < 1e-6
    stock = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "out").eval()
    torch.testing.assert_close(out(stock), wanted, **close)
    fold_model(model, tmp_path / "live")
    assert diff(tmp_path / "out", tmp_path / "live").whole.distance < 1e-5
    sizes = {u.module: u.norm for u in inspect_adapter(tmp_path / "a").updates}
    assert sizes.keys() == {p.module for p in report.layers}
    assert min(sizes.values()) > 0
    assert {u.module for u in inspect_adapter(model).updates} == sizes.keys()
    if fields.get("target_parameters") == BOTH and name == "qwen3_moe":
        fold_adapter(tmp_path / "a", tmp_path / "each", profile="per_expert", probe=False)
        stock = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "each").eval()
        torch.testing.assert_close(out(stock), wanted, **close)


def test_experts_without_a_base_ask_for_it(tmp_path: Path) -> None:
    saved("mixtral", tmp_path, target_modules=["q_proj"], target_parameters=BOTH)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "nowhere/gone"}))
    for call in (lambda: fold_adapter(tmp_path / "a", tmp_path / "out"), lambda: inspect_adapter(tmp_path / "a")):
        with pytest.raises(RankfoldError, match=r"base='nowhere/gone'.*--base FOLDER"):
            call()


@pytest.mark.parametrize("arch", ["mixtral", "llama"])
def test_sums_and_differences_with_our_own(arch: str, tmp_path: Path) -> None:
    fields = PARAMETERS["mixtral"][1] if arch == "mixtral" else FOLDERS[EMBEDDING][1]
    base, model = saved(arch, tmp_path, **fields)
    ours = get_peft_model(type(base).from_pretrained(tmp_path / "base"), PlainLoraConfig(r=3, **fields))  # pyright: ignore
    generator = torch.Generator().manual_seed(2)
    for p in ours.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=generator) / 4
    ours.save_pretrained(tmp_path / "b")
    combine([tmp_path / "a", tmp_path / "b"], tmp_path / "sum", weights=[1.0, 1.0])
    combine([tmp_path / "sum", tmp_path / "b"], tmp_path / "back", weights=[1.0, -1.0])
    assert diff(tmp_path / "back", tmp_path / "a").whole.relative < 1e-5  # type: ignore[operator]
    fresh = type(base).from_pretrained(tmp_path / "base")
    back = PeftModel.from_pretrained(fresh, tmp_path / "back").eval()
    torch.testing.assert_close(out(back), out(model), **close)


@pytest.mark.parametrize("arch", ["mixtral", "llama"])
def test_a_plan_knows_the_fold(arch: str) -> None:
    fields = PARAMETERS["mixtral"][1] if arch == "mixtral" else FOLDERS[EMBEDDING][1]
    found = [cost(small(arch), make(r=4, **fields)).fold for make in (LoraConfig, PlainLoraConfig)]
    assert found[0] == found[1]
    assert isinstance(found[0], Fold)


# What is not an update of the weight ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_groups_are_refused(tmp_path: Path) -> None:
    model = lora(mixed(), target_modules=["grouped"])
    with pytest.raises(RankfoldError, match=r"target_modules: grouped is a convolution with groups.*leave it out"):
        fold_model(model, tmp_path / "out")
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(RankfoldError, match=r"grouped.*a convolution with groups"):
        fold_adapter(tmp_path / "a", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("more", [{"dilation": 2}, {"padding_mode": "circular"}])
def test_what_pefts_convolution_leaves_out_is_refused(more: dict[str, Any], tmp_path: Path) -> None:
    model = lora(nn.Sequential(nn.Conv1d(3, 4, 3, padding="same", **more)), target_modules=["0"])
    with pytest.raises(
        RankfoldError, match="target_modules: 0 is a convolution with groups, dilation or padding other"
    ):
        fold_model(model, tmp_path / "out")


def test_other_types_on_convolutions_are_refused(tmp_path: Path) -> None:
    model = get_peft_model(mixed(), peft.LoHaConfig(r=2, target_modules=["line", "head"]))  # pyright: ignore
    with pytest.raises(RankfoldError, match="target_modules: line is a Conv1d, and of LOHA"):
        fold_model(model, tmp_path / "out")
