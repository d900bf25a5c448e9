"""The loss of a language model is TRL's, to rounding, with the head's products where labels are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import byte_tokenizer, write_jsonl
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    BartConfig,
    BartForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

from rankfold.errors import RankfoldError
from rankfold.runfile.load import parse
from rankfold.tasks.causal_lm import TASK
from rankfold.train import loss as loss_module
from rankfold.train.hf_api import mend_loss_of_routers
from rankfold.train.loss import score_as_the_model_does, score_labels_only
from rankfold.train.run import train

SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 50,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


def model(
    ours: bool, dtype: torch.dtype = torch.float32, config: Any = LlamaConfig, make: Any = LlamaForCausalLM
) -> Any:
    torch.manual_seed(0)
    made = make(config(**SIZES)).to(dtype)
    made.requires_grad_(False)
    for layer in made.model.layers:
        layer.mlp.down_proj.weight.requires_grad_()
    add_fused_lm_head(made, outputs=("log_probs", "entropy", "is_top1"))
    if ours:
        score_labels_only(made)
    return made


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, 50, (3, 9))
    labels = ids.clone()
    labels[0, :4], labels[1, 6:], labels[2] = -100, -100, -100
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(m: Any, weights: Tensor | None = None) -> tuple[Any, list[Tensor]]:
    m.zero_grad()
    out = m(**batch(), fused_lm_head=True)
    weights = torch.ones(3, 8) if weights is None else weights
    (out.log_probs * weights).sum().backward()
    return out, [p.grad for p in m.parameters() if p.grad is not None]


@pytest.mark.parametrize("chunk", [1, 250, 2**24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_same_as_trls(dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    weights = torch.rand(3, 8)  # a gradient that differs from token to token, as in DFT
    (found, grads), (expected, theirs) = (step(model(ours, dtype), weights) for ours in (True, False))
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    assert_close(found.log_probs, expected.log_probs, **tolerance)
    assert_close(found.loss, expected.loss, **tolerance)
    assert torch.equal(found.label_mask, expected.label_mask)
    assert dtype == torch.bfloat16 or torch.equal(found.is_top1.bool(), expected.is_top1.bool())
    assert_close(grads, theirs, **tolerance)


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        (found, grads), (expected, theirs) = (step(model(ours)) for ours in (True, False))
    assert_close(found.log_probs, expected.log_probs, atol=2e-2, rtol=2e-2)
    assert_close(grads, theirs, atol=2e-2, rtol=2e-2)


def rows_scored(m: Any, monkeypatch: pytest.MonkeyPatch, **changed: Any) -> int:
    """How many rows the head of rankfold's loss met."""
    seen: list[int] = []
    original = loss_module.linear

    def counted(rows: Tensor, weight: Tensor) -> Any:
        seen.append(len(rows))
        return original(rows, weight)

    monkeypatch.setattr(loss_module, "linear", counted)
    with torch.no_grad():
        m(**{**batch(), "fused_lm_head": True, **changed})
    return sum(seen)


def test_rows_without_a_label_never_meet_the_head(monkeypatch: pytest.MonkeyPatch):
    assert rows_scored(model(True), monkeypatch) == 5 + 5


def test_a_batch_without_labels_has_no_gradient_and_no_nan():
    m = model(True)
    rows = batch()
    out = m(**{**rows, "labels": torch.full_like(rows["labels"], -100)}, fused_lm_head=True)
    assert out.loss == 0
    out.log_probs.sum().backward()
    assert all(not p.grad.any() for p in m.parameters() if p.grad is not None)


def test_what_it_cannot_do_is_left_to_trl(monkeypatch: pytest.MonkeyPatch):
    trained = model(True)
    trained.lm_head.weight.requires_grad_()
    assert rows_scored(trained, monkeypatch) == 0
    assert step(trained)[0].entropy.any()  # TRL's
    softcapped = model(True, config=Gemma2Config, make=Gemma2ForCausalLM)
    assert rows_scored(softcapped, monkeypatch) == 0
    assert rows_scored(model(True), monkeypatch, num_items_in_batch=3) == 0
    plain = model(True)(input_ids=batch()["input_ids"])
    assert plain.logits.shape == (3, 9, 50)


def odd(config: Any, make: Any, **more: Any) -> tuple[Any, bool]:
    """A model with the fused head or its own logits, whichever it needs, and whether those are its own."""
    torch.manual_seed(0)
    made = make(config(**SIZES | more)).eval()
    head = made.get_output_embeddings()
    torch.nn.init.normal_(head.weight)
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    add_fused_lm_head(made, outputs=("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"))
    score_labels_only(made.requires_grad_(False))
    fused = made.forward
    score_as_the_model_does(made, TASK.example(made.config))
    return made, made.forward != fused


SPECIAL = {f"{name}_token_id": 1 for name in ("pad", "bos", "eos", "cls", "sep")}
ODD = {
    "bias": (ModernBertDecoderConfig, ModernBertDecoderForCausalLM, SPECIAL),
    "soft cap": (RecurrentGemmaConfig, RecurrentGemmaForCausalLM, {"lru_width": 16, "attention_window_size": 32, "head_dim": 8}),
    "soft cap that TRL knows": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 8}),
    "nothing": (LlamaConfig, LlamaForCausalLM, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_the_loss_is_the_models_own(name: str):
    config, make, more = ODD[name]
    made, own = odd(config, make, **more)
    rows = batch()
    found = made(**rows, fused_lm_head=True)
    logits = made(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False).logits[:, :-1]
    labels = rows["labels"][:, 1:]
    wanted = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    assert_close(-found.log_probs, wanted, atol=1e-4, rtol=1e-4)
    assert_close(found.loss, wanted.sum() / (labels != -100).sum(), atol=1e-4, rtol=1e-4)
    assert torch.equal(found.is_top1.bool(), (logits.argmax(-1) == labels) & (labels != -100))
    assert own == (name in ("bias", "soft cap"))
    if own:
        picked = logits[labels != -100].log_softmax(-1)
        assert_close(found.entropy[labels != -100], -(picked.exp() * picked).sum(-1))
        assert_close(found.log_sum_sq_probs[labels != -100], picked.exp().square().sum(-1).log())
        assert_close(found.mean_logits[labels != -100], logits[labels != -100].mean(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_not_another_loss(dtype: torch.dtype):
    made = model(True, dtype)
    before = made.forward
    torch.nn.init.normal_(made.lm_head.weight, std=5)
    score_as_the_model_does(made, TASK.example(made.config))
    assert made.forward == before


BAMBA = {
    "mamba_n_heads": 2, "mamba_d_state": 8, "mamba_chunk_size": 8, "attn_layer_indices": [1], "z_loss_coefficient": 0.1,
}  # fmt: skip
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1}
BART = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
TERMS = {
    "of the logits": (BambaConfig, BambaForCausalLM, BAMBA),
    "of routers, which TRL knows": (MixtralConfig, MixtralForCausalLM, MOE),
    "none, but labels that are not shifted": (BartConfig, BartForCausalLM, BART),
}


@pytest.mark.parametrize("name", TERMS)
def test_terms_that_models_add_to_their_loss(name: str):
    config, make, more = TERMS[name]
    torch.manual_seed(0)
    made = make(config(**SIZES | more)).eval()
    add_fused_lm_head(made, outputs=("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"))
    score_labels_only(made.requires_grad_(False))
    assert score_as_the_model_does(made, TASK.example(made.config), terms=True) == (name == "of the logits")
    if name == "of the logits":
        rows = batch()
        logits = made(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
        found = made(**rows, fused_lm_head=True, output_router_logits=True)  # which TRL asks for with any term
        assert_close(found.aux_loss, 0.1 * logits.logsumexp(-1).square().mean())


@pytest.mark.parametrize("experts", [0, 4])
def test_routers_that_trl_does_not_find(experts: int):
    """Granite 4 has dense models, and the configs of its mixtures do not say `num_experts`."""
    torch.manual_seed(0)
    more = {"num_local_experts": experts, "layer_types": ["full_attention"] * 2, "mamba_n_heads": 2}
    made = GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**SIZES | more, shared_intermediate_size=8)).eval()
    trainer: Any = SimpleNamespace(aux_loss_enabled=True)
    made.config.output_router_logits = True  # as TRL's trainer does
    add_fused_lm_head(made)
    mend_loss_of_routers(trainer, made, TASK.example(made.config))
    assert trainer.aux_loss_enabled == made.config.output_router_logits == bool(experts)
    found = made(**batch(), fused_lm_head=True)
    assert (found.aux_loss is None) == (not experts)
    if experts:
        assert_close(found.aux_loss, made(**batch()).aux_loss)


BYTES = {"vocab_size": len(byte_tokenizer())}


def values_of(base: Any, task: str, folder: Path) -> dict[str, Any]:
    """A run file's, for one step on a few rows."""
    base.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"{i}?", "completion": "yes", "chosen": "yes", "rejected": "no"} for i in range(8)]
    return {
        "model": str(folder / "model"),
        "task": task,
        "data": {"train": str(write_jsonl(folder / "rows.jsonl", rows)), "test": 0.3},
        "method": {"name": "lora", "r": 2, "target_modules": "all-linear"},
        "training": {"max_steps": 1, "batch_size": 4},
        "output": str(folder / "run"),
    }


@pytest.mark.parametrize("task", ["causal-lm", "preference"])
def test_a_run_learns_from_the_models_own_logits(task: str, tmp_path: Path):
    torch.manual_seed(0)
    base = ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**SIZES | SPECIAL | BYTES))
    torch.nn.init.normal_(base.get_output_embeddings().bias)
    seen: list[Tensor] = []

    @torch.no_grad()
    def look(trainer: Any, split: str, rows: Any) -> dict[str, float]:
        made = trainer.model.get_base_model()
        ids = TASK.example(made.config)["input_ids"]
        logits = made(input_ids=ids).logits[:, :-1]
        wanted = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        seen.append(wanted + made(input_ids=ids, labels=ids, fused_lm_head=True).log_probs)
        return {}

    train(parse(values_of(base, task, tmp_path)), measure=look, say=lambda _: None)
    assert len(seen) == 2
    assert float(torch.stack(seen).abs().max()) < 1e-4


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated in `SFTTrainer`")
def test_a_run_trains_what_the_model_adds_to_its_loss(tmp_path: Path):
    torch.manual_seed(0)
    values = values_of(BambaForCausalLM(BambaConfig(**SIZES | BAMBA | BYTES)), "causal-lm", tmp_path)
    seen: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def look(trainer: Any, split: str, rows: Any) -> dict[str, float]:
        trainer.model.eval()
        seen.append((trainer.compute_loss(trainer.model, batch()), trainer.model.get_base_model()(**batch()).loss))
        return {}

    with pytest.raises(RankfoldError, match=r"label_smoothing_factor=0\.1 would leave out what BambaForCausalLM adds"):
        train(parse(values, ["training.extra={label_smoothing_factor: 0.1}"]), say=lambda _: None)
    train(parse(values), measure=look, say=lambda _: None)
    assert len(seen) == 2
    for found, wanted in seen:
        assert_close(found, wanted)
