"""What a merge does to a weight that several layers share; copies and pickles of scheduled models."""

from __future__ import annotations

import copy
import io
import warnings
from collections import OrderedDict

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import WhisperConfig, WhisperForConditionalGeneration

from rankfold import AdaSvdConfig, PlainLoraConfig, RasaConfig, SoraConfig
from rankfold.errors import RankfoldError
from rankfold.host.layer import AdaptedLayer


class Tied(nn.Module):
    """Zamba2's way (peft#2018): the same parameter in two layers."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False, dtype=dtype), nn.Linear(8, 8, bias=False, dtype=dtype)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def tied(config: type = PlainLoraConfig, dtype: torch.dtype = torch.float32, **fields) -> nn.Module:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"first, second share one weight"):
        return get_peft_model(
            Tied(dtype), config(r=2, target_modules=["first", "second"], init_lora_weights=False, **fields)
        )


@pytest.mark.parametrize("config", [PlainLoraConfig, RasaConfig, SoraConfig])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_tied_layers_gives_the_base_back(config, dtype):
    model = tied(config, dtype)
    weight = model.base_model.model.first.base_layer.weight
    before, x = weight.detach().clone(), torch.randn(3, 8, dtype=dtype)
    expected = model(x)
    for _ in range(10):
        model.merge_adapter()
        assert not torch.equal(weight, before)
        model.unmerge_adapter()
        assert torch.equal(weight, before)
    assert model.base_model.model.second.base_layer.weight is weight
    assert_close(model(x), expected, rtol=0, atol=0)


def test_disabling_while_merged_gives_the_base_back():
    model = tied()
    bare, x = Tied(), torch.randn(3, 8)
    bare.load_state_dict({"first.weight": model.base_model.model.first.base_layer.weight}, strict=False)
    model.merge_adapter()
    with model.disable_adapter():
        assert_close(model(x), bare(x), rtol=0, atol=0)


def test_one_of_two_tied_layers_unmerged_leaves_the_others_update():
    model = tied()
    first, second = model.base_model.model.first, model.base_model.model.second
    before = first.base_layer.weight.detach().clone()
    model.merge_adapter()
    first.unmerge()
    assert_close(first.base_layer.weight, before + second.get_delta_weight("default"))
    second.unmerge()
    assert torch.equal(first.base_layer.weight, before)


def test_a_copy_of_a_merged_tied_model_unmerges_for_itself():
    model = tied()
    before = model.base_model.model.first.base_layer.weight.detach().clone()
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert torch.equal(twin.base_model.model.second.base_layer.weight, before)
    assert not torch.equal(model.base_model.model.first.base_layer.weight, before)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.first.base_layer.weight, before)


# Copies of scheduled models ---------------------------------------------------------------------------------------------


def scheduled(config: type) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), config(target_modules=["0"]))


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["copied", "pickled"])
@pytest.mark.parametrize("config", [AdaSvdConfig, SoraConfig])
@pytest.mark.parametrize("attached", [False, True])
def test_a_copy_trained_without_its_controller_is_refused_and_not_saved(copied, config, attached, tmp_path):
    """A copy has no controller, whatever the original has: it hangs on the original's optimiser."""
    from rankfold import attach

    model = scheduled(config)
    if attached:
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=10)
    twin = copied(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin(torch.randn(2, 8)).sum().backward()
    with pytest.raises(RankfoldError, match="trained without its controller"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="trained without its controller"):
        twin.save_pretrained(tmp_path)


def test_a_copied_layer_keeps_what_it_needs():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), RasaConfig(r=4, target_modules=["0", "1"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for twin in (copy.deepcopy(model), pickled(model)):
            x = torch.randn(2, 8)
            assert_close(twin(x), model(x), rtol=0, atol=0)
            layers = [m for m in twin.modules() if isinstance(m, AdaptedLayer)]
            assert all(layer.base_weight.layers() == [layer] for layer in layers)
            twin.merge_adapter()
            twin.unmerge_adapter()
            assert_close(twin(x), model(x), rtol=0, atol=0)


# Weights that are read or made past the module ---------------------------------------------------------------------------


def test_merging_into_a_recomputed_weight_warns():
    base = nn.Sequential(OrderedDict(linear=torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))))
    model = get_peft_model(base, PlainLoraConfig(target_modules=["linear"], init_lora_weights=False))
    with pytest.warns(UserWarning, match="recomputed at every forward"):
        model.merge_adapter()


def test_the_fast_path_of_torchs_encoder_layer_is_named():
    base = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    with pytest.warns(UserWarning, match=r"set_fastpath_enabled\(False\)"):
        get_peft_model(base, PlainLoraConfig(target_modules=["linear1"]))


def test_global_hooks_see_every_layer_of_a_fused_mlp():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    mlp = nn.Sequential(LlamaMLP(LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2)))
    model = get_peft_model(mlp, PlainLoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"]))
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        model(torch.randn(2, 8))
    finally:
        handle.remove()
    assert sum(isinstance(m, AdaptedLayer) for m in seen) == 3


def test_what_a_model_reads_of_its_layers():
    """Whisper reads its convolution's stride; PEFT's own layer has none."""
    conv, table = nn.Conv1d(4, 4, 3, stride=2, padding=1), nn.Embedding(5, 4, padding_idx=0)
    model = get_peft_model(
        nn.ModuleDict({"conv": conv, "table": table}), PlainLoraConfig(target_modules=["conv", "table"])
    )
    adapted, looked_up = model.base_model.model["conv"], model.base_model.model["table"]
    assert isinstance(adapted, AdaptedLayer)
    assert (adapted.stride, adapted.padding, adapted.kernel_size, adapted.in_channels) == ((2,), (1,), (3,), 4)
    assert (looked_up.num_embeddings, looked_up.embedding_dim, looked_up.padding_idx) == (5, 4, 0)


def test_whisper_with_its_convolutions():
    config = WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, vocab_size=50, max_source_positions=20,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    base = WhisperForConditionalGeneration(config).eval()
    given = {"input_features": torch.randn(1, 8, 40), "decoder_input_ids": torch.ones(1, 3, dtype=torch.long)}
    bare = base(**given).logits.detach()
    model = get_peft_model(base, RasaConfig(r=2, shared_rank=1, target_modules=["conv1", "conv2", "q_proj"])).eval()
    assert_close(model(**given).logits, bare)
    model(**given).logits.square().sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad.sign()
    trained = model(**given).logits.detach()
    assert not torch.allclose(trained, bare, atol=1e-3)
    assert_close(model.merge_and_unload()(**given).logits, trained, rtol=1e-4, atol=1e-5)


def test_unmerging_after_a_cast_gives_the_model_s_dtype():
    model = tied()
    model.merge_adapter()
    model.to(torch.bfloat16).unmerge_adapter()
    assert model.base_model.model.first.base_layer.weight.dtype == torch.bfloat16
    with model.disable_adapter():
        assert model(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
