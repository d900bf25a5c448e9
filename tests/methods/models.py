"""Small models of every architecture, built from their config with random weights; knows nothing of rankfold."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor, nn

VOCAB = 48


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(12, 12, bias=False)
        self.mlp = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.q_proj(x)
        return x + self.mlp(x)


class Mlp(nn.Module):
    """Not a transformers model: no config, modules called like adapters, and layers that cannot be adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 12)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.norm = nn.LayerNorm(12)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(12, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.conv(self.embed(ids)[:, None])[:, 0])
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@dataclass(frozen=True)
class Arch:
    """An architecture.

    Args:
        make: the model.
        targets: names of two kinds of linear layer that every block has.
        task: PEFT's task type, or None. SEQ_CLS makes PEFT train the head in full beside the adapter.
        default: whether PEFT knows which modules to adapt.
        head: that head, or one to give as modules_to_save.
    """

    name: str
    make: Callable[[], nn.Module]
    targets: tuple[str, str]
    task: str | None = None
    default: bool = True
    head: tuple[str, ...] = ()

    def build(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
        """The same weights every time, without touching the caller's generator."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return self.make().eval().to(device=device, dtype=dtype)

    def inputs(self, device: torch.device | str = "cpu", rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, VOCAB, (rows, 6), generator=g)
        match self.name:
            case "vit":
                batch = {"pixel_values": torch.randn(rows, 3, 8, 8, generator=g), "labels": ids[:, 0] % 3}
            case "bert":
                batch = {"input_ids": ids, "labels": ids[:, 0] % 3}
            case "mlp":
                batch = {"ids": ids}
            case _:
                batch = {"input_ids": ids, "labels": ids}
        return {k: v.to(device) for k, v in batch.items()}

    @torch.no_grad()  # with gradients, attention takes another kernel where the base is not frozen
    def out(self, model: nn.Module, batch: dict[str, Tensor] | None = None, **kwargs) -> Tensor:
        """The logits, the batch being `inputs` on the model's device by default."""
        result = self._run(model, batch, **kwargs)
        return result if isinstance(result, Tensor) else result.logits

    def loss(self, model: nn.Module, batch: dict[str, Tensor] | None = None) -> Tensor:
        """A mean over rows, so that it adds up over micro-batches."""
        result = self._run(model, batch)
        return result.float().square().mean() if isinstance(result, Tensor) else result.loss

    def _run(self, model: nn.Module, batch: dict[str, Tensor] | None, **kwargs):
        p = next(model.parameters())
        batch = self.inputs(p.device) if batch is None else batch
        if self.name == "vit":
            batch = {**batch, "pixel_values": batch["pixel_values"].to(p.dtype)}
        return model(**batch, **kwargs)


_SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "initializer_range": 0.2,  # the usual 0.02 would let the layers' work vanish in the residual stream
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}


def _llama(**changes) -> nn.Module:
    sizes = {"vocab_size": VOCAB, "num_key_value_heads": 1, "max_position_embeddings": 32}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**_SMALL, **sizes, **tokens, **changes}))


def _gpt2() -> nn.Module:
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 3, "n_head": 2, "initializer_range": 0.2}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(**sizes, **quiet, vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )


def _t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    return hf.T5ForConditionalGeneration(
        hf.T5Config(**sizes, vocab_size=VOCAB, dropout_rate=0.0, pad_token_id=0, decoder_start_token_id=0)
    )


LLAMA = Arch("llama", _llama, ("q_proj", "down_proj"), "CAUSAL_LM")
TIED = Arch("llama-tied", lambda: _llama(tie_word_embeddings=True), ("q_proj", "down_proj"), "CAUSAL_LM")
#: bitsandbytes' kernels want multiples of 64
WIDE = Arch("llama", lambda: _llama(hidden_size=64, intermediate_size=128), ("q_proj", "down_proj"), "CAUSAL_LM")
GPT2 = Arch("gpt2", _gpt2, ("c_attn", "c_proj"), "CAUSAL_LM")  # c_proj: two types of different shape, one name
BERT = Arch(
    "bert",
    lambda: hf.BertForSequenceClassification(hf.BertConfig(**_SMALL, **_NO_DROPOUT, vocab_size=VOCAB)),
    ("query", "output.dense"),
    "SEQ_CLS",
    head=("classifier",),
)
T5 = Arch("t5", _t5, ("q", "wo"), "SEQ_2_SEQ_LM")
VIT = Arch(
    "vit",
    lambda: hf.ViTForImageClassification(hf.ViTConfig(**_SMALL, **_NO_DROPOUT, image_size=8, patch_size=4)),
    ("q_proj", "fc2"),
    default=False,
    head=("classifier",),
)
MLP = Arch("mlp", Mlp, ("q_proj", "mlp.2"), default=False, head=("head",))
ARCHS = {arch.name: arch for arch in (LLAMA, GPT2, BERT, T5, VIT, MLP)}


def linear_shapes(model: nn.Module, targets: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """(out, in) of every module that a list of suffixes names, by name."""
    return {
        name: (m.weight.shape[0], m.weight.shape[1]) if isinstance(m, nn.Linear) else tuple(m.weight.shape[::-1])
        for name, m in model.named_modules()
        if any(name == t or name.endswith("." + t) for t in targets)
    }


def kinds(names: list[str]) -> dict[str, list[str]]:
    """The names by kind: what is left of a name when the number of its block is taken out."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "N", "." + name), []).append(name)
    return found
