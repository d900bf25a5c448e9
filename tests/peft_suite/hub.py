"""Small models with random weights under the names that PEFT's tests ask the hub for, laid out as the hub's own cache.

make("hub")          # then HF_HUB_CACHE=hub HF_HUB_OFFLINE=1
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

VOCAB = 120
_COMMIT = "0" * 40
_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _llama_like(config: type, model: type, **more) -> Callable[[], torch.nn.Module]:
    sizes = {**_SIZES, **_TOKENS, "vocab_size": VOCAB, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return lambda: model(config(**sizes, **more))


def _bert_like(config: type, model: type, **more) -> Callable[[], torch.nn.Module]:
    return lambda: model(config(**_SIZES, vocab_size=VOCAB, max_position_embeddings=64, **more))


def _opt() -> torch.nn.Module:
    sizes = {
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 16,
    }
    return hf.OPTForCausalLM(hf.OPTConfig(**sizes, **_TOKENS, vocab_size=VOCAB, max_position_embeddings=64))


def _gpt2() -> torch.nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(**_TOKENS, n_embd=16, n_layer=2, n_head=4, n_positions=64, vocab_size=VOCAB)
    )


def _gptj() -> torch.nn.Module:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
    return hf.GPTJForCausalLM(hf.GPTJConfig(**_TOKENS, **sizes, vocab_size=VOCAB))


def _bart() -> torch.nn.Module:
    sides = {
        f"{side}_{name}": n
        for side in ("encoder", "decoder")
        for name, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 24))
    }
    return hf.BartForConditionalGeneration(
        hf.BartConfig(**sides, d_model=16, vocab_size=VOCAB, max_position_embeddings=64, **_TOKENS)
    )


def _t5() -> torch.nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, vocab_size=VOCAB))


def _gemma3() -> torch.nn.Module:
    return _llama_like(hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, head_dim=8)()


_LLAMA = _llama_like(hf.LlamaConfig, hf.LlamaForCausalLM)
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": _opt,
    "peft-internal-testing/opt-125m": _opt,
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": _gpt2,
    "hf-internal-testing/tiny-random-gpt2": _gpt2,
    "gpt2": _gpt2,
    "bert-base-uncased": _bert_like(hf.BertConfig, hf.BertForSequenceClassification),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": _gptj,
    "trl-internal-testing/tiny-random-LlamaForCausalLM": _LLAMA,
    "peft-internal-testing/tiny-random-LlamaForCausalLM": _LLAMA,
    "peft-internal-testing/tiny-dummy-qwen2": _llama_like(hf.Qwen2Config, hf.Qwen2ForCausalLM),
    "hf-internal-testing/tiny-random-MistralForCausalLM": _llama_like(hf.MistralConfig, hf.MistralForCausalLM),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": _gemma3,
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": _llama_like(
        hf.LlamaConfig, hf.LlamaForSequenceClassification
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": _t5,
    "peft-internal-testing/tiny-random-t5": _t5,
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": _bart,
    "peft-internal-testing/tiny-random-BertModel": _bert_like(hf.BertConfig, hf.BertModel),
    "peft-internal-testing/tiny-random-RobertaModel": _bert_like(hf.RobertaConfig, hf.RobertaModel),
    "peft-internal-testing/tiny-random-DebertaModel": _bert_like(hf.DebertaConfig, hf.DebertaModel),
    "peft-internal-testing/tiny-random-DebertaV2Model": _bert_like(hf.DebertaV2Config, hf.DebertaV2Model),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": _bert_like(
        hf.BertConfig, hf.BertForSequenceClassification
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": _bert_like(
        hf.RobertaConfig, hf.RobertaForSequenceClassification
    ),
}


def make(cache: Path) -> None:
    """Writes every model, the same each time, and one tokenizer beside it."""
    words = Tokenizer(
        models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCAB)}, "<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    for name, build in MODELS.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        torch.manual_seed(0)
        snapshot = folder / "snapshots" / _COMMIT
        build().save_pretrained(snapshot)
        tokenizer.save_pretrained(snapshot)
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs/main").write_text(_COMMIT)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
