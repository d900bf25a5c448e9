"""Bases as float32 GGUF files, in which llama.cpp computes as transformers does."""

from __future__ import annotations

from pathlib import Path

import gguf
from transformers import PreTrainedModel

from rankfold.fold.profiles.gguf import ARCHITECTURES, row_order


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
    if isinstance(config.eos_token_id, int):  # else llama.cpp takes that of GPT-2, 11
        w.add_eos_token_id(config.eos_token_id)
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
    finish(w)


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
    finish(w)


def _add_vocabulary(w: gguf.GGUFWriter, size: int) -> None:
    """Tokens that are only numbered: the engine's server aborts on a model without any."""
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    tokens = ["Ċ", "a", "b", "ab"]  # a newline, which it looks up, and one merge, since an empty list is not written
    w.add_token_list([*tokens, *(f"<{i}>" for i in range(len(tokens), size))])
    w.add_token_types([gguf.TokenType.NORMAL] * size)
    w.add_token_merges(["a b"])
    w.add_add_bos_token(False)


def finish(w: gguf.GGUFWriter) -> None:
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
