"""Every method in TRL's trainers of preferences and rewards: DPO, KTO, Reward and GRPO, given as a config or as a wrapped model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from models import LLAMA, VOCAB, Arch
from peft import PeftModel, get_peft_model
from table import FIRST, ROWS, Row, adapter_buffers, adapter_parameters, first_rows, snapshot
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

from rankfold import AdapterCallback, Factors
from rankfold.host import registry
from rankfold.host.layer import AdaptedLayer

STEPS = 6
PAIRS = [{"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2}", "rejected": f" w{i + 3} w{i}"} for i in range(3, 19)]
ANSWERS = [{"prompt": p["prompt"], "completion": p["chosen"], "label": i % 2 == 0} for i, p in enumerate(PAIRS)]
#: What makes a schedule cut ranks within the steps.
CUTS: dict[str, dict[str, Any]] = {
    "sora": {"threshold": 0.05},
    "adalora": {"target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1},
    "dynamic_dora": {"target_r": 2, "interval": 1, "start": 0.1, "end": 0.3},
}
#: Ranks of all modules at the end, where a schedule says them: two kinds of modules in three layers.
LEFT = {"adalora": 2 * 6, "dynamic_dora": 2 * 6}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    disable_progress_bars()


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")


def _scorer() -> torch.nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlamaConfig(
        **sizes, vocab_size=VOCAB, num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0, num_labels=1
    )
    return LlamaForSequenceClassification(config)


SCORER = Arch("scorer", _scorer, LLAMA.targets, "SEQ_CLS", head=("score",))


def short_answers(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(set(completion.split()))) + len(completion) / 100 for completion in completions]


#: name → trainer, its arguments, the model it trains, its rows, further arguments.
TRAINERS: dict[str, tuple[Any, Any, Arch, list[dict[str, Any]], dict[str, Any]]] = {
    "dpo": (DPOTrainer, DPOConfig, LLAMA, PAIRS, {}),
    "kto": (KTOTrainer, KTOConfig, LLAMA, ANSWERS, {}),
    "reward": (RewardTrainer, RewardConfig, SCORER, PAIRS, {}),
    "grpo": (
        GRPOTrainer,
        GRPOConfig,
        LLAMA,
        [{"prompt": p["prompt"]} for p in PAIRS],
        {"num_generations": 4, "max_completion_length": 4, "beta": 0.04},
    ),
}
trainers = pytest.mark.parametrize("name", TRAINERS)


def made(name: str, row: Row, folder: Path, *, wrapped: bool, **changes: Any) -> Any:
    """A trainer for six steps of four rows."""
    trainer, arguments, arch, data, more = TRAINERS[name]
    schedule = {"allow_unscheduled": False} | CUTS[row.facts.method] if row.facts.method in CUTS else {}
    config = row.config(arch, **schedule, **changes)
    args = arguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        logging_steps=1,
        save_steps=3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
        activation_checkpointing=False,
        **more,
    )
    model: Any = arch.build()
    if wrapped:
        model = get_peft_model(model, config)
    reward = {"reward_funcs": short_answers} if name == "grpo" else {}
    return trainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer(),
        peft_config=None if wrapped else config,
        callbacks=[AdapterCallback()],
        **reward,
    )


def controlled(row: Row) -> bool:
    return registry.get(row.facts.method).controller is not None


def check(name: str, row: Row, folder: Path, *, wrapped: bool) -> None:
    """Trains: only the adapter (and a head) moves, its schedule runs to its end, and it comes back from its file."""
    run = made(name, row, folder, wrapped=wrapped)
    assert ("ref" in run.model.peft_config) == (wrapped and name != "reward")
    callback = next(c for c in run.callback_handler.callbacks if isinstance(c, AdapterCallback))
    before = snapshot(run.model)
    run.train()
    after = snapshot(run.model)
    ours = {n for n, p in adapter_parameters(run.model) if p.numel() and ".ref." not in n}
    links = {
        n for n in adapter_buffers(run.model) if ".ref." not in n
    }  # a knot adds a link, and may draw a factor anew
    moved = {n for n in after if not torch.equal(after[n], before[n]) and "modules_to_save" not in n}
    assert moved <= ours | (links if controlled(row) else set())
    assert all(n.endswith("gate") and not after[n].any() for n in ours - moved)  # a module that lost all of its ranks
    controllers = callback.attached.controllers if callback.attached else {}
    assert bool(controllers) == controlled(row)
    for controller in controllers.values():
        assert (controller.step, controller.finished()) == (STEPS, True)
        left = sum(controller.ranks().values())
        if row.facts.method in CUTS:
            assert left == LEFT.get(row.facts.method, left) < sum(a.r for a in controller.adapters)
    assert (folder / "checkpoint-3" / "adapter_model.safetensors").exists()
    again = PeftModel.from_pretrained(TRAINERS[name][2].build(), folder / f"checkpoint-{STEPS}")
    batch = {"input_ids": torch.arange(3, 15).view(2, 6)}
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, run.model.eval()(**batch).logits)


@first_rows
@pytest.mark.parametrize("name", ["dpo", "kto", "reward"])
def test_from_a_config(name: str, row: Row, tmp_path: Path) -> None:
    check(name, row, tmp_path, wrapped=False)


@pytest.mark.slow
@first_rows
def test_grpo_from_a_config(row: Row, tmp_path: Path) -> None:
    check("grpo", row, tmp_path, wrapped=False)


wrapped = pytest.mark.parametrize("row", [row for row in FIRST if row.facts.method in ("rasa", "adalora")], ids=str)


@wrapped
@trainers
def test_a_wrapped_model(name: str, row: Row, tmp_path: Path) -> None:
    """A shared pool and a schedule. TRL adds a copy of the adapter as the reference, which stays as it was."""
    check(name, row, tmp_path, wrapped=True)


@pytest.mark.parametrize("row", [*FIRST, *(row for row in ROWS if row.variant == "dropout")], ids=str)
def test_the_reference_is_what_training_began_with(row: Row, tmp_path: Path) -> None:
    """An adapter that has learnt something already: at the first step nothing is preferred yet, so the loss is log 2. TRL turns
    off dropout, which would make it noisy."""
    run = made("dpo", row, tmp_path, wrapped=True, init_lora_weights=False)
    run.train()
    first, last = run.state.log_history[0], run.state.log_history[-2]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert last["loss"] != pytest.approx(math.log(2), abs=1e-3)


def test_the_reference_of_a_chain_has_its_links(tmp_path: Path) -> None:
    """TRL copies an adapter's parameters, and what is frozen in it as well is the callback's to copy."""
    row = next(row for row in FIRST if row.facts.method == "cola")
    run = made("dpo", row, tmp_path, wrapped=True, init_lora_weights=False)
    chains = [m.lowrank_adapters for m in run.model.modules() if isinstance(m, AdaptedLayer)]
    for held in chains:
        held["default"].add_link(Factors(torch.randn_like(held["default"].down), torch.randn_like(held["default"].up)))
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(held["ref"].frozen_rank == row.kwargs["r"] for held in chains)
