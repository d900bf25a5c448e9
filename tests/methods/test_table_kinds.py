"""Every method on every kind of module that is not linear: convolutions and embeddings, against torch and against stock PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from models import LLAMA, TIED, VOCAB, Arch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from table import FIRST, Row, adapt, assert_same, second, snapshot, stir
from torch import Tensor, nn
from torch.func import functional_call

from rankfold import PlainLoraConfig, RasaConfig
from rankfold.errors import RankfoldError
from rankfold.fold import fold_model
from rankfold.host.layer import AdaptedLayer
from rankfold.plan.cost import cost

KINDS = ["embed", "line", "plane", "space"]


class Mixed(nn.Module):
    """One module of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 6, padding_idx=3)
        self.line = nn.Conv1d(6, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=4, padding_mode="circular", bias=False)
        self.plane = nn.Conv2d(1, 6, (5, 1), padding="same")
        self.space = nn.Conv3d(6, 6, 1)
        self.head = nn.Linear(8, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.grouped(self.line(self.embed(ids).transpose(1, 2)))
        x = self.space(self.plane(x[:, None])[..., None])[..., 0].mean(1)
        return self.head(x.transpose(1, 2))


MIXED = Arch("mlp", Mixed, ("embed", "line"), default=False)
(CORA,) = (row for row in FIRST if row.facts.method == "cora")
OTHERS = [row for row in FIRST if row is not CORA]
methods = pytest.mark.parametrize("row", OTHERS, ids=str)
everywhere = {"target_modules": [*KINDS, "grouped", "head"]}


def found(model: nn.Module) -> dict[str, AdaptedLayer]:
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, AdaptedLayer)}


@methods
def test_forward_merge_and_gradients_are_those_of_the_changed_weights(row: Row) -> None:
    model = adapt(MIXED, row, **everywhere).double()
    base, ids = MIXED.build().double(), MIXED.inputs()["ids"]
    adapters = {name: layer.adapters(["default"])[0] for name, layer in found(model).items()}
    assert len(adapters) == 6

    def changed() -> dict[str, Tensor]:
        deltas = {name: torch.stack([b.delta() for b in a.blocks()]).sum(0) for name, a in adapters.items()}
        return {
            f"{name}.weight": base.get_parameter(f"{name}.weight")
            + (delta.T if name == "embed" else delta.view_as(base.get_parameter(f"{name}.weight")))
            for name, delta in deltas.items()
        }

    wanted = functional_call(base, changed(), (ids,))
    torch.testing.assert_close(model(ids), wanted)
    own = [p for p in model.parameters() if p.requires_grad]
    weights = torch.randn(wanted.shape, dtype=torch.float64)
    got = torch.autograd.grad((model(ids) * weights).sum(), own)
    ours = torch.autograd.grad((wanted * weights).sum(), own)
    for name, a, b in zip([n for n, p in model.named_parameters() if p.requires_grad], got, ours, strict=True):
        if "embed" not in name or name.endswith(
            "up"
        ):  # a padding row's `down` has no gradient, as in torch's own table
            torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")
    before = snapshot(model)
    model.merge_adapter()
    torch.testing.assert_close(MIXED.out(model), wanted.detach())
    for name, layer in found(model).items():
        torch.testing.assert_close(
            layer.get_delta_weight("default"), changed()[f"{name}.weight"] - base.get_parameter(f"{name}.weight")
        )
    model.unmerge_adapter()
    assert_same(snapshot(model), before)


@methods
def test_saved_loaded_switched_and_mixed(row: Row, tmp_path: Path) -> None:
    model = adapt(MIXED, row, **everywhere)
    model.peft_config["default"].allow_unscheduled = True  # pyright: ignore[reportAttributeAccessIssue]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(MIXED.build(), tmp_path).eval()
    wanted, ids = MIXED.out(model), MIXED.inputs()["ids"]
    assert torch.equal(MIXED.out(again), wanted)
    # fewer columns than the second adapter has ranks
    narrow = ["plane", "space"] if row.facts.method == "sbora" else None
    second(again, MIXED, row, exclude_modules=narrow, **everywhere)  # pyright: ignore[reportArgumentType]
    names = ["default", "other", "__base__"]
    mixed = MIXED.out(again, adapter_names=names)
    again.set_adapter("other")
    torch.testing.assert_close(mixed[1], MIXED.out(again, {"ids": ids[1:2]})[0])
    torch.testing.assert_close(mixed[0], wanted[0])
    torch.testing.assert_close(mixed[2], MIXED.out(MIXED.build())[2])


@methods
@pytest.mark.parametrize("profile", ["uniform", "compact"])
def test_folds_to_what_stock_peft_loads(row: Row, profile: str, tmp_path: Path) -> None:
    model = adapt(MIXED, row, target_modules=[*KINDS, "head"])
    model.peft_config["default"].allow_unscheduled = True  # pyright: ignore[reportAttributeAccessIssue]
    report = fold_model(model, tmp_path, profile=profile)
    assert report.worst.frobenius < 1e-6
    assert list(report.serve) == ["PEFT"]
    stock = PeftModel.from_pretrained(MIXED.build(), tmp_path).eval()
    torch.testing.assert_close(MIXED.out(stock), MIXED.out(model), rtol=1e-4, atol=1e-5)
    shapes = {k: v.ndim for k, v in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert shapes["base_model.model.embed.lora_embedding_A"] == 2
    assert shapes["base_model.model.plane.lora_A.weight"] == 4


def test_the_first_update_is_zero_and_an_embedding_starts_as_pefts() -> None:
    for row in OTHERS:
        model = adapt(MIXED, row, live=False, **everywhere)
        torch.testing.assert_close(MIXED.out(model), MIXED.out(MIXED.build()), rtol=1e-6, atol=1e-6)
    (adapter,) = found(adapt(MIXED, OTHERS[0], live=False, **everywhere))["embed"].adapters(["default"])
    assert not adapter.get_parameter("down").any()
    assert 0.5 < adapter.get_parameter("up").std() < 2


def test_plain_lora_is_pefts_on_the_same_modules() -> None:
    ours = get_peft_model(MIXED.build(), PlainLoraConfig(r=4, target_modules=KINDS))  # pyright: ignore[reportArgumentType]
    theirs: Any = get_peft_model(MIXED.build(), LoraConfig(r=4, target_modules=KINDS))  # pyright: ignore[reportArgumentType]
    stir(ours)
    for name, layer in found(ours).items():
        (adapter,), stock = layer.adapters(["default"]), theirs.get_submodule(f"base_model.model.{name}")
        down, up = adapter.get_parameter("down").data, adapter.get_parameter("up").data
        if name == "embed":
            stock.lora_embedding_A["default"].data, stock.lora_embedding_B["default"].data = down, up
        else:
            a, b = stock.lora_A["default"].weight, stock.lora_B["default"].weight
            a.data, b.data = down.view_as(a), up.view_as(b)
        if name != "space":  # PEFT's fails on a 1×1×1 kernel
            torch.testing.assert_close(layer.get_delta_weight("default"), stock.get_delta_weight("default"))
    torch.testing.assert_close(MIXED.out(ours), MIXED.out(theirs.eval()))
    count = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs)]
    assert count[0] == count[1]


def test_a_scaled_embedding_scales_its_update() -> None:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    config = hf.Gemma3TextConfig(
        **sizes, num_key_value_heads=1, vocab_size=VOCAB, tie_word_embeddings=False, pad_token_id=0
    )
    torch.manual_seed(0)
    model = get_peft_model(hf.Gemma3ForCausalLM(config), RasaConfig(r=4, target_modules=["embed_tokens"]))
    stir(model)
    ids = torch.arange(1, 8)[None]
    wanted = model.eval()(ids).logits
    model.merge_adapter()
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_an_untied_head_and_its_embedding_on_a_llama(tmp_path: Path) -> None:
    row = OTHERS[1]
    LLAMA.build().save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    model = adapt(LLAMA, row, target_modules=["embed_tokens", "lm_head", "q_proj"])
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    with pytest.warns(UserWarning, match="save_embedding_layers"):  # PEFT's, that it saves the base's table as well
        model.save_pretrained(tmp_path / "own")
    again = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "own").eval()  # pyright: ignore[reportArgumentType]
    assert torch.equal(LLAMA.out(again), LLAMA.out(model))
    fold_model(model, tmp_path / "out")
    stock = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "out").eval()  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(LLAMA.out(stock), LLAMA.out(model), rtol=1e-4, atol=1e-5)
    fold_model(model, tmp_path / "merged", profile="merged")
    merged = hf.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(LLAMA.out(merged), LLAMA.out(model), rtol=1e-4, atol=1e-5)


@methods
def test_a_table_is_saved_as_it_was_before_a_merge(row: Row, tmp_path: Path) -> None:
    """PEFT saves it beside the adapter and loads it under it, where a merged update would count twice."""
    model = adapt(LLAMA, row, target_modules=["embed_tokens", "q_proj"], allow_unscheduled=True)
    wanted = LLAMA.out(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(LLAMA.build(), tmp_path).eval()  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(LLAMA.out(read), wanted)


@methods
def test_a_tied_head_shares_the_embeddings_adapter(row: Row, tmp_path: Path) -> None:
    """PEFT adds the update twice when it merges (peft 0.21.2); here it lies in the one weight once."""
    fields: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    model = adapt(TIED, row, **fields)
    embedding, head = found(model)["model.embed_tokens"], found(model)["lm_head"]
    torch.testing.assert_close(head.get_delta_weight("default"), embedding.get_delta_weight("default"))
    assert not list(head.lowrank_adapters["default"].parameters())
    wanted, before = TIED.out(model), snapshot(model)
    model.merge_adapter()
    torch.testing.assert_close(TIED.out(model), wanted, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert_same(snapshot(model), before)
    model.peft_config["default"].allow_unscheduled = True  # pyright: ignore[reportAttributeAccessIssue]
    model.save_pretrained(tmp_path / "own", save_embedding_layers=False)
    assert torch.equal(TIED.out(PeftModel.from_pretrained(TIED.build(), tmp_path / "own").eval()), wanted)  # pyright: ignore
    fold_model(model, tmp_path / "out")
    stock = PeftModel.from_pretrained(TIED.build(), tmp_path / "out").eval()  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(TIED.out(stock), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(TIED.out(copy.deepcopy(model)), wanted)


@pytest.mark.parametrize("arch", [LLAMA, TIED], ids=lambda arch: arch.name)
def test_token_rows_are_trained_by_pefts_own_mechanism(arch: Arch, tmp_path: Path) -> None:
    model = adapt(arch, OTHERS[1], target_modules=["q_proj"], trainable_token_indices=[1, 5])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    arch.loss(model.train()).backward()
    optimizer.step()
    wanted = arch.out(model.eval())
    model.save_pretrained(tmp_path)
    assert torch.equal(arch.out(PeftModel.from_pretrained(arch.build(), tmp_path).eval()), wanted)  # pyright: ignore
    with pytest.raises(RankfoldError, match=r"trainable_token_indices=\[1, 5\]: it trains rows of the embedding"):
        fold_model(model, tmp_path / "out")
    torch.testing.assert_close(arch.out(model.merge_and_unload()), wanted, rtol=1e-4, atol=1e-5)  # pyright: ignore


def test_what_has_no_fold_says_so(tmp_path: Path) -> None:
    model = adapt(MIXED, OTHERS[0], target_modules=["grouped"])
    with pytest.raises(RankfoldError, match=r"grouped is a convolution with groups.*merged"):
        fold_model(model, tmp_path)
    for profile in ("gguf", "mlx"):
        with pytest.raises(RankfoldError, match="embed is not a linear layer"):
            fold_model(adapt(MIXED, OTHERS[0], target_modules=["embed"]), tmp_path, profile=profile)
    assert not list(tmp_path.iterdir())


def test_a_method_of_linear_layers_refuses_before_anything_is_touched() -> None:
    model = MIXED.build()
    before = snapshot(model)
    for name in ("embed", "line"):
        config = CORA.config(MIXED, target_modules=["head", name])
        with pytest.raises(RankfoldError, match=rf"{name} is of the kind .* cora adapts linear layers alone"):
            get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
        assert_same(snapshot(model), before)


def test_a_table_that_its_forward_changes_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=1.0), nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"0 has max_norm=1.0, .* leave it out of target_modules"):
        get_peft_model(model, PlainLoraConfig(target_modules=["0", "1"]))  # pyright: ignore[reportArgumentType]


@methods
def test_counts_of_a_plan(row: Row) -> None:
    spent = cost(MIXED.build(), row.config(MIXED, **everywhere))
    assert spent.trained == sum(p.numel() for p in adapt(MIXED, row, **everywhere).parameters() if p.requires_grad)
    assert spent.flops is not None
    assert isinstance(spent.fold, str) == ("grouped" in everywhere["target_modules"])
