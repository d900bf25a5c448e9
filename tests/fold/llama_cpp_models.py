"""What the tests of llama.cpp need: bases as float32 GGUF files, PEFT folders as its converter writes them, its log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
import xllamacpp
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from rankfold.fold.profiles.gguf import ARCHITECTURES, row_order, tensor_names


def write_float32(model: PreTrainedModel, path: Path) -> None:
    """A model with a vocabulary that nobody needs. What llama.cpp's converter does to each family is done here once more, by hand: the
    order of q's and k's rows, and Gemma's norms, which are stored plus one."""
    config = model.config
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type].name]
    gemma = config.model_type.startswith("gemma")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    w = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    w.add_type(gguf.GGUFType.MODEL)
    _add_vocabulary(w, config.vocab_size)
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_block_count(config.num_hidden_layers)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_key_length(head)
    w.add_value_length(head)
    w.add_rope_dimension_count(head)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    w.add_rope_freq_base(float(rope.get("full_attention", rope)["rope_theta"]))
    if gemma:
        w.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        w.add_attn_logit_softcapping(config.attn_logit_softcapping)
        w.add_final_logit_softcapping(config.final_logit_softcapping)
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, kind = name.rsplit(".", 1)
        order = row_order(module, tensor.shape[0], config)
        stored = tensor if order is None else tensor[order]
        stored = stored + 1 if gemma and module.endswith("norm") else stored
        w.add_tensor(f"{table.get_name(module)}.{kind}", stored.float().numpy())
    _finish(w)


def widen(quantised: Path, path: Path) -> None:
    """The same model with every tensor in float32, so that llama.cpp computes as transformers does."""
    source = gguf.GGUFReader(quantised)
    architecture = source.fields["general.architecture"].contents()
    w = gguf.GGUFWriter(path, architecture)
    for key, field in source.fields.items():
        if key.startswith("GGUF.") or key in (
            "general.architecture",
            "general.file_type",
            "general.quantization_version",
        ):
            continue
        inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        w.add_key_value(key, field.contents(), field.types[0], inner)
    for tensor in source.tensors:
        w.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    _finish(w)


def as_the_converter_does(folder: Path, config: PretrainedConfig, path: Path) -> None:
    """A folder in PEFT's layout as llama.cpp's convert_lora_to_gguf.py turns it into a file: it reads lora_alpha and the
    tensors, and no other field of the config."""
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    w = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[ARCHITECTURES[config.model_type].name]])
    w.add_type(gguf.GGUFType.ADAPTER)
    w.add_string(gguf.Keys.Adapter.TYPE, "lora")
    w.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, kind = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        order = row_order(module, tensor.shape[0], config) if kind == "lora_B" else None
        stored = tensor if order is None else tensor[order]
        w.add_tensor(f"{tensor_names([module], config)[module]}.{kind.lower()}", stored.float().numpy())
    _finish(w)


def log_probs(
    base: Path, tokens: list[int], lengths: Sequence[int], lora: Path | None = None, scale: float = 1.0
) -> Tensor:
    """llama.cpp's log-probabilities of the token behind the first n tokens, lengths × vocabulary."""
    server, rows = _server(base, lora, scale), []
    vocabulary = len(gguf.GGUFReader(base).fields["tokenizer.ggml.tokens"].data)
    for n in lengths:
        row = torch.full((vocabulary,), -torch.inf)
        for entry in _complete(server, tokens[:n], 1, vocabulary)[0]["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
        rows.append(row)
    return torch.stack(rows)


def greedy(base: Path, tokens: list[int], steps: int, lora: Path | None = None) -> list[int]:
    """The most likely next token, `steps` times."""
    return [token["id"] for token in _complete(_server(base, lora, 1.0), tokens, steps, 1)]


def _complete(server: xllamacpp.Server, tokens: list[int], steps: int, top: int) -> list[dict[str, Any]]:
    request = {
        "prompt": tokens, "max_tokens": steps, "logprobs": top, "temperature": 0, "ignore_eos": True,
        "cache_prompt": False, "stream": False,
    }  # fmt: skip
    return server.handle_completions(request)["choices"][0]["logprobs"]["content"]


def _server(base: Path, lora: Path | None, scale: float) -> xllamacpp.Server:
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(base), 256, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.verbosity, params.warmup = -1, False
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), scale)]
    # The cache of keys and values is float16 by default, worth 1e-2; flash attention would round as well
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def _add_vocabulary(w: gguf.GGUFWriter, size: int) -> None:
    """Tokens that are only numbered: the engine's server aborts on a model without any."""
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    tokens = ["Ċ", "a", "b", "ab"]  # a newline, which it looks up, and one merge, since an empty list is not written
    w.add_token_list([*tokens, *(f"<{i}>" for i in range(len(tokens), size))])
    w.add_token_types([gguf.TokenType.NORMAL] * size)
    w.add_token_merges(["a b"])
    w.add_add_bos_token(False)


def _finish(w: gguf.GGUFWriter) -> None:
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
