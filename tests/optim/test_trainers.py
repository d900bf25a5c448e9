"""transformers' Trainer and TRL's SFTTrainer make the optimiser through the factory, and resume it to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from small_llama import TARGETS, adapted, batch, llama, trained
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from rankfold import AdapterCallback, PlainLoraConfig, SoraConfig
from rankfold.errors import RankfoldError
from rankfold.optim import LoraRite, pairs
from rankfold.optim.create import optimizer_cls_and_kwargs
from rankfold.optim.registry import OPTIMIZERS


def rows() -> Dataset:
    ids = batch(0, rows=16)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def trainer(folder: Path, model: Any, name: str, steps: int, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.5,
        save_steps=2, report_to=[], use_cpu=True, logging_steps=1, lr_scheduler_type="linear", warmup_steps=1, disable_tqdm=True,
        activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": False}, dataloader_pin_memory=False,
    )  # fmt: skip
    found = Trainer(
        model, arguments, train_dataset=rows(), callbacks=[AdapterCallback()],
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(name, model, lr=0.01, **options),
    )  # fmt: skip
    found.remove_callback(PrinterCallback)
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trainer_resumes_exactly(name: str, tmp_path: Path) -> None:
    def model() -> Any:
        return adapted(SoraConfig(r=4, threshold=1e-3, lora_dropout=0.1, target_modules=TARGETS))

    straight, resumed = model(), model()
    trainer(tmp_path / "a", straight, name, 4).train()
    started = trainer(tmp_path / "a", resumed, name, 4)
    started.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert type(started.optimizer.optimizer) is OPTIMIZERS[name].cls  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    before = trained(model())
    for n, value in trained(straight).items():
        assert torch.equal(trained(resumed)[n], value), n
    assert any(not torch.equal(value, before[n]) for n, value in trained(straight).items())


def test_a_trainer_makes_it_twice(tmp_path: Path) -> None:
    model = adapted()
    found = trainer(tmp_path, model, "lora_rite", 2, clip=0.5)
    first = found.create_optimizer()
    found.optimizer = None
    second = found.create_optimizer()
    assert isinstance(first, LoraRite)
    assert isinstance(second, LoraRite)
    assert first is not second
    assert second.param_groups[0]["clip"] == 0.5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sft_trainer_adds_the_adapter(name: str, tmp_path: Path) -> None:
    """TRL wraps the model after the helper was called."""
    arguments = SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True, bf16=False,
        activation_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")), pad_token="a", eos_token="b"
    )
    found = SFTTrainer(
        llama(), arguments, train_dataset=rows(), peft_config=PlainLoraConfig(r=4, target_modules=TARGETS), processing_class=tokenizer,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(name, lr=0.01),
    )  # fmt: skip
    found.remove_callback(PrinterCallback)
    found.train()
    assert type(found.optimizer.optimizer) is OPTIMIZERS[name].cls  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    own = pairs(found.model, frozen_down=True)  # pyright: ignore[reportArgumentType]
    assert len(own) == 6
    assert all(p.up.any() for p in own)
    assert {p.down.requires_grad for p in own} == {name != "lora_fa"}


def test_mistakes_are_told_before_training() -> None:
    with pytest.raises(RankfoldError, match="did you mean 'lora_rite'"):
        optimizer_cls_and_kwargs("lora_write", lr=1e-3)
    with pytest.raises(RankfoldError, match="option clp=1 is not known"):
        optimizer_cls_and_kwargs("lora_rite", lr=1e-3, clp=1)
    with pytest.raises(RankfoldError, match="LoraRite: lr=-1 must be"):
        optimizer_cls_and_kwargs("lora_rite", lr=-1)
    with pytest.raises(RankfoldError, match="no trainable pair"):
        optimizer_cls_and_kwargs("lora_rite", llama(), lr=1e-3)
