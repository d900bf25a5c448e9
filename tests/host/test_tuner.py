"""What the tuner does at the edges: names that wrappers and renamings change, states that lack something, refused files."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, MambaConfig, MambaForCausalLM

from rankfold import AdaSvdConfig, PlainLoraConfig, RasaConfig, SoraConfig
from rankfold.host.checkpoint import short_keys

IDS = torch.arange(6)[None]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def llama(cls: type = LlamaForCausalLM) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    return cls(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


def rasa(**fields) -> RasaConfig:
    return RasaConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **fields})


def test_group_names_are_short_legal_and_different():
    keys = ["encoder.block.*.layer.0.SelfAttention.q:8x8", "decoder.block.*.layer.0.SelfAttention.q:8x8"]
    assert list(short_keys(keys).values()) == [
        k.replace(".", "-").replace("*", "-").replace(":", "-").replace("---", "-") for k in keys
    ]
    assert short_keys(["m.a:b", "m.a-b"]) == {"m.a:b": "a-b-0", "m.a-b": "a-b-1"}
    assert short_keys([]) == {}


@pytest.mark.parametrize(("saved", "loaded"), [(LlamaModel, LlamaForCausalLM), (LlamaForCausalLM, LlamaModel)])
def test_a_pool_loads_onto_the_model_with_or_without_a_head(saved, loaded, tmp_path):
    """transformers' load_adapter on another class of the same body (peft#3110): as per-layer methods do."""
    model = get_peft_model(llama(saved), rasa())
    body = model.get_base_model() if saved is LlamaModel else model.get_base_model().model
    expected = body(IDS).last_hidden_state
    model.save_pretrained(tmp_path)
    other = llama(loaded)
    other.load_state_dict(llama(loaded).state_dict())
    other.load_adapter(tmp_path)
    found = (other if loaded is LlamaModel else other.model)(IDS).last_hidden_state
    assert_close(found, expected)


def test_a_compiled_model_is_adapted(tmp_path):
    """peft#2957."""
    plain, compiled = get_peft_model(llama(), rasa()), get_peft_model(torch.compile(llama(), backend="eager"), rasa())
    state = get_peft_model_state_dict(plain)
    compiled.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == state.keys()
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert_close(again(IDS).logits, compiled(IDS).logits)


def test_what_is_wrapped_for_activation_checkpointing_is_saved_whole(tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = get_peft_model(llama(), rasa())
    expected = get_peft_model_state_dict(model)
    layers = model.get_base_model().model.layers
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer)
    model.save_pretrained(tmp_path)
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in found)


@pytest.mark.parametrize("config", [PlainLoraConfig, RasaConfig])
def test_a_partial_state_is_not_saved(config, tmp_path):
    model = get_peft_model(llama(), config(r=4, target_modules=["q_proj"], init_lora_weights=False))
    state = model.state_dict()
    sharded = {k: torch.zeros(0) if "lowrank_" in k else v for k, v in state.items()}
    with pytest.raises(ValueError, match="empty tensors"):
        model.save_pretrained(tmp_path / "a", state_dict=sharded)


def test_a_refused_file_leaves_no_random_adapter(tmp_path):
    model = get_peft_model(llama(), rasa())
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(min(tensors))
    save_file(tensors, file)
    with pytest.raises(ValueError, match="lacks 1 of"):
        model.load_adapter(tmp_path, "b")
    assert list(model.peft_config) == ["default"]
    assert not any("b" in getattr(m, "lowrank_adapters", {}) for m in model.modules())


def test_a_field_assigned_after_construction_is_checked_when_it_is_used():
    config = rasa()
    config.bias = "all"
    with pytest.raises(ValueError, match="bias='all'"):
        get_peft_model(llama(), config)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (SoraConfig, "init_lora_weights", "pissa"),
        (AdaSvdConfig, "init_lora_weights", None),
        (RasaConfig, "init_lora_weights", 0),
        (AdaSvdConfig, "target_r", 2.5),
        (AdaSvdConfig, "deltaT", 1.5),
        (SoraConfig, "threshold", True),
        (SoraConfig, "threshold", "x"),
        (PlainLoraConfig, "use_rslora", "no"),
        (PlainLoraConfig, "modules_to_save", "head"),
        (PlainLoraConfig, "target_modules", 3),
        (PlainLoraConfig, "rank_pattern", [1]),
        (PlainLoraConfig, "lora_alpha", True),
        (PlainLoraConfig, "layers_to_transform", "1"),
        (AdaSvdConfig, "beta1", 0),
    ],
)
def test_every_field_has_its_type(config, field, value):
    with pytest.raises(
        ValueError, match=rf"{config.__name__}: {field}={value!r} must be ".replace("[", r"\[").replace("]", r"\]")
    ):
        config(**{field: value})


def test_fields_of_lora_config_that_are_lacking_take_their_default_or_a_reason():
    values = {
        k: v
        for k, v in LoraConfig(r=4, target_modules=["q_proj"]).to_dict().items()
        if k not in ("peft_type", "peft_version")
    }
    config = RasaConfig(**{k: v for k, v in values.items() if k != "runtime_config"})
    assert config.r == 4
    with pytest.raises(ValueError, match=r"RasaConfig: use_dora=True is not supported: .*rankfold fold"):
        RasaConfig(use_dora=True)
    with pytest.raises(TypeError, match="nonsense"):
        RasaConfig(nonsense=1)


def test_what_pefts_lora_refuses_on_mamba_is_refused():
    """peft#2274: the fused kernel reads the weight past the module."""
    model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4))
    with pytest.raises(ValueError, match="out_proj of a mamba model cannot be adapted"):
        get_peft_model(model, PlainLoraConfig(target_modules=["out_proj"]))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_target_with_pefts_own_adapter_says_so():
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).base_model.model
    with pytest.raises(TypeError, match=r"carries an adapter of PEFT's already .*merge_and_unload"):
        inject_adapter_in_model(PlainLoraConfig(target_modules=["q_proj"]), model)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0])


def test_an_adapter_without_a_gradient_in_the_first_step_is_named():
    """nn.MultiheadAttention reads out_proj's weight past its forward (peft#2200)."""
    model = get_peft_model(Attention(), PlainLoraConfig(target_modules=["out_proj", "head"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(1, 3, 8)).sum().backward()
    with pytest.warns(UserWarning, match=r"attention\.out_proj: the adapter got no gradient"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # said once


@pytest.mark.parametrize("config", [RasaConfig, SoraConfig])
def test_gates_cast_by_hand_are_float32_again_before_they_are_used(config):
    """TRL casts adapters by `param.data` on quantised bases (trl#7268)."""
    model = get_peft_model(llama().bfloat16(), config(r=4, target_modules=["q_proj"]))
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(torch.bfloat16)
    model(input_ids=IDS, labels=IDS).loss.backward()
    gates = [p for n, p in model.named_parameters() if n.endswith("gate")]
    assert gates
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in gates)


def test_a_saved_folder_has_legal_names(tmp_path: Path):
    model = get_peft_model(llama(), rasa())
    model.save_pretrained(tmp_path)
    assert not any(set(k) & set('/\\:*?"<>|') for k in load_file(tmp_path / "adapter_model.safetensors"))


def test_a_pool_of_an_offloaded_model_is_fetched():
    """accelerate's cpu_offload (peft#2407): the pool's module is called, so that its hook brings the values."""
    from accelerate import cpu_offload

    model = get_peft_model(llama(), rasa()).eval()
    expected = model(IDS).logits
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    assert_close(model(IDS).logits, expected)
