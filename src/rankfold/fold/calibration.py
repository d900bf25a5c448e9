"""What the adapted modules see: second moments E[x xᵀ] of their inputs on texts of the user's."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PretrainedConfig

from rankfold.errors import RankfoldError
from rankfold.host.checkpoint import plain_modules

#: How much of a file is read; second moments settle long before.
TEXTS, TOKENS = 256, 512


def read_texts(path: str | Path) -> list[str]:
    """The texts of a calibration file: of a .jsonl the field "text" of each line, else the paragraphs.

    Raises:
        ValueError: no file, no texts, or a line without the field.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RankfoldError(f"calibration={str(path)!r} cannot be read: {error}") from None
    if path.suffix != ".jsonl":
        texts = [part.strip() for part in content.split("\n\n")]
    else:
        texts = [_text(line, f"calibration={str(path)!r}, line {i}") for i, line in enumerate(content.splitlines(), 1)]
    texts = [t for t in texts if t][:TEXTS]
    if not texts:
        raise RankfoldError(f"calibration={str(path)!r} holds no text")
    return texts


def _text(line: str, where: str) -> str:
    if not line.strip():
        return ""
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise RankfoldError(f'{where}: every line must be like {{"text": "…"}}')
    return text


def tokenise(texts: list[str], base: str | None, model: PretrainedConfig, revision: str | None = None) -> list[Tensor]:
    """Token ids (1 × length) of each text, by the base's tokenizer, no more of them than the model has positions for.

    Args:
        base: folder or hub id.
        model: the config of the model that they are for.
        revision: of a hub id.

    Raises:
        ValueError: there is no tokenizer, it makes nothing of the texts, or is another model's.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise RankfoldError(
            f"base={base!r} has no tokenizer, which calibration needs ({reason}); give --base"
        ) from None
    longest = min(TOKENS, getattr(model, "max_position_embeddings", None) or TOKENS)
    batches = [tokenizer(t, truncation=True, max_length=longest, return_tensors="pt")["input_ids"] for t in texts]
    batches = [b for b in batches if b.numel()]
    if not batches:
        raise RankfoldError(
            f"base={base!r}: its tokenizer makes no tokens of the calibration's texts; are its files whole?"
        )
    largest, words = max(int(b.max()) for b in batches), getattr(model, "vocab_size", None)
    if words is not None and largest >= words:
        raise RankfoldError(
            f"base={base!r}: its tokenizer gives id {largest}, and the model has {words}; it is another's"
        )
    return batches


def second_moments(model: nn.Module, modules: list[str], batches: list[Tensor]) -> dict[str, Tensor]:
    """E[x xᵀ] (in × in, float32 on the CPU) of every module's input over all tokens of the batches.

    Args:
        model: the base with its adapter, so that later layers see what they will see.
        modules: names within it.
        batches: token ids, one text each: padding would count as input.

    Raises:
        RankfoldError: a module that the model does not have, or that no input reaches.
    """
    sums: dict[str, Tensor] = {}
    seen: dict[str, int] = dict.fromkeys(modules, 0)
    found = dict(plain_modules(model))
    unknown = next((name for name in modules if name not in found), None)
    if unknown is not None:
        raise RankfoldError(
            f"calibration: {type(model).__name__} has no module {unknown}, whose inputs could be weighed, as this version of "
            "transformers loads it; compress without calibration"
        )

    def watch(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            seen[name] += len(x)
            product = (x.T @ x).cpu()
            sums[name] = sums[name].add_(product) if name in sums else product

        return hook

    hooks = [found[name].register_forward_pre_hook(watch(name)) for name in modules]
    training = model.training
    device = next(model.parameters()).device
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                model(input_ids=batch.to(device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    unseen = [name for name in modules if name not in sums]
    if unseen:
        raise RankfoldError(f"calibration: no input reached {unseen[0]}; use texts that run through it")
    return {name: total / seen[name] for name, total in sums.items()}
