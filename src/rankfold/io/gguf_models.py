"""A causal language model in one GGUF file as a plain float32 folder, which training needs: dequantised, made once."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rankfold.errors import RankfoldError
from rankfold.io.cache import MissingAssetError, cached_folder
from rankfold.io.files import sha256
from rankfold.io.old_keys import add_old_keys

logger = logging.getLogger(__name__)

#: Raise it when what is written changes, so that a folder that lies in a cache is made anew.
WRITTEN = 2


def load_gguf_folder(path: str | os.PathLike[str]) -> Path:
    """A plain float32 folder (safetensors, config, tokenizer) made from any causal language model in one GGUF file.

    It is kept in the cache under the file's name and the hash of its content, and made once.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a GGUF file, or transformers cannot read the model in it.
    """
    path = Path(path)
    return cached_gguf(path, path.stem, _write_through_transformers)


def cached_gguf(path: Path, name: str, write: Callable[[Path, Path], None]) -> Path:
    """The cached folder of a GGUF file, made by `write(path, folder)` under `name` and the hash of the content."""
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {path}: give the path of one existing .gguf file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise RankfoldError(f"{path} is not a GGUF file: it does not begin with the bytes GGUF")
    if importlib.util.find_spec("gguf") is None:
        raise MissingAssetError(f"reading {path} needs the package gguf: `pip install 'rankfold[gguf]'`")

    def build(folder: Path) -> None:
        logger.info("converting %s to plain float32 safetensors, once, into %s", path, folder.parent)
        write(path, folder)
        add_old_keys(folder)

    return cached_folder(f"{name}-{sha256(path)[:16]}-v{WRITTEN}", build)


def write_llama(path: Path, folder: Path) -> None:
    """Write the Llama model with a GPT-2-style tokenizer in a GGUF file as a plain folder.

    Bit-identical to transformers' own GGUF loading (a test compares them) and three times as fast.
    """
    import gguf
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig

    reader = gguf.GGUFReader(path)

    def field(key: str) -> Any:
        found = reader.get_field(key)
        if found is None:
            raise RankfoldError(
                f"{path} has no field {key!r}: it is not the file that rankfold knows, reinstall its package"
            )
        return found.contents()

    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        if block := re.fullmatch(r"blk\.(\d+)\.(.+)", tensor.name):
            if block[2] in ("attn_q.weight", "attn_k.weight"):
                weight = _unpermute(weight, heads if block[2] == "attn_q.weight" else kv_heads)
            weights[f"model.layers.{block[1]}.{_LLAMA_BLOCK[block[2]]}"] = weight
        else:
            weights[_LLAMA_TOP[tensor.name]] = weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    special = {
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
    }
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=field("llama.rope.dimension_count"),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        tie_word_embeddings="lm_head.weight" not in weights,
        **special,
    )
    config.save_pretrained(folder)
    GenerationConfig(**special).save_pretrained(folder)
    _write_smollm_tokenizer(field, folder)


_LLAMA_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LLAMA_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def _unpermute(weight: Any, heads: int) -> Any:
    """Undo llama.cpp's order of the rows of q and k, which interleaves the halves that the rotary embedding pairs."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _write_smollm_tokenizer(field: Callable[[str], Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if (kind := (field("tokenizer.ggml.model"), field("tokenizer.ggml.pre"))) != ("gpt2", "smollm"):
        raise RankfoldError(f"tokenizer {kind} in the GGUF file is not ('gpt2', 'smollm'): reinstall its package")
    tokens: list[str] = field("tokenizer.ggml.tokens")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(pair.split(" ")) for pair in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # llama.cpp's "smollm": every digit alone, then GPT-2's pattern. transformers' GGUF reader leaves the digits out
    # and so splits several spaces before a number otherwise than the model has learnt.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # the token type of llama.cpp for tokens that never stand for text
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, field("tokenizer.ggml.token_type"), strict=True)
            if kind == control
        ]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[field("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[field("tokenizer.ggml.eos_token_id")],
        unk_token=tokens[field("tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[field("tokenizer.ggml.padding_token_id")],
        chat_template=field("tokenizer.chat_template"),
        model_max_length=field("llama.context_length"),
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def _write_through_transformers(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise RankfoldError(f"transformers cannot read the model in {path}: {error}") from error
    # transformers 5.23 leaves a quantiser on a model read from GGUF, though its weights are plain, and then refuses to
    # train or save it. A model built anew from the same configuration has none.
    vars(model.config).pop("quantization_config", None)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    if model.generation_config is not None:
        plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
