"""What the tests of llama.cpp need: PEFT folders as its converter writes them, its log-probabilities."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
import xllamacpp
from gguf_bases import finish
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig

from rankfold.fold.profiles.gguf import ARCHITECTURES, row_order, tensor_names


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
    finish(w)


def log_probs(
    base: Path, tokens: list[int], lengths: Sequence[int], lora: Path | None = None, scale: float = 1.0
) -> Tensor:
    """llama.cpp's log-probabilities of the token behind the first n tokens, lengths × vocabulary."""
    server, rows, vocabulary = _server(base, lora, scale), [], _vocabulary(base)
    for n in lengths:
        row = torch.full((vocabulary,), -torch.inf)
        for entry in _complete(server, tokens[:n], 1, vocabulary)[0]["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
        rows.append(row)
    return torch.stack(rows)


@functools.cache
def _vocabulary(base: Path) -> int:
    """Of the bundled base it takes the reader seconds."""
    return len(gguf.GGUFReader(base).fields["tokenizer.ggml.tokens"].data)


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
