"""AdapterCallback in transformers' Trainer and TRL's SFTTrainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from safetensors.torch import load_file
from toy import SCHEDULED, STEPS, adapters, alive, assert_same, llama, trainer
from transformers import TrainerCallback

from rankfold import AdapterCallback
from rankfold.errors import RankfoldError

scheduled = pytest.mark.parametrize("method", SCHEDULED)
#: Sum of the ranks at the end over the four modules, where a budget says it.
BUDGET = {"adalora": 8, "dynamic_dora": 8}


def schedule(folder: Path) -> dict[str, Any] | None:
    return json.loads((folder / "adapter_config.json").read_text())["schedule"]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ranks.jsonl").read_text().splitlines()]


@scheduled
def test_trainer(method: str, tmp_path: Path) -> None:
    """Accumulation, clipping, a warm-up and decay, Trainer's default (fused) optimiser: the schedule runs, silently."""
    model, callback = llama(method), AdapterCallback()
    run = trainer(model, tmp_path, callback, gradient_accumulation_steps=3, max_grad_norm=0.5, warmup_steps=2)
    run.train()
    assert callback.attached is not None
    controller = callback.attached.controllers["default"]
    assert controller.step == run.state.global_step == STEPS
    assert controller.total_steps == STEPS
    ranks = callback.attached.ranks()["default"]
    assert sum(ranks.values()) == BUDGET.get(method, sum(alive(model)))
    assert sum(ranks.values()) < 16
    assert next(iter(ranks)) == "model.layers.0.self_attn.q_proj"
    run.save_model(str(tmp_path / "adapter"))
    written = {"step": STEPS, "total_steps": STEPS, "finished": True}
    assert schedule(tmp_path / "adapter") == written == schedule(tmp_path / f"checkpoint-{STEPS}")
    early = schedule(tmp_path / "checkpoint-4")
    assert early == {"step": 4, "total_steps": STEPS, "finished": method == "sora"}
    assert [line["step"] for line in lines(tmp_path)][:3] == [2, 4, 6]
    assert lines(tmp_path)[-1] == {"step": STEPS, "ranks": {"default": ranks}}
    assert not any(a.scheduled for a in adapters(model))


@pytest.mark.parametrize("method", [*SCHEDULED, "rasa"])
def test_resumed_is_uninterrupted(method: str, tmp_path: Path) -> None:
    """Bit for bit, dropout included, whatever step the run is killed at after a checkpoint."""

    class Killed(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7:
                raise KeyboardInterrupt

    whole = llama(method)
    trainer(whole, tmp_path / "whole", AdapterCallback()).train()
    with pytest.raises(KeyboardInterrupt):
        trainer(llama(method), tmp_path / "killed", AdapterCallback(), Killed()).train()
    resumed = llama(method, seed=99)
    trainer(resumed, tmp_path / "killed", AdapterCallback()).train(resume_from_checkpoint=True)
    assert_same(toy.state(resumed), toy.state(whole))
    assert resumed.peft_config["default"].schedule == whole.peft_config["default"].schedule
    last = f"checkpoint-{STEPS}"
    for name in ("optimizer.pt", "scheduler.pt"):
        one, two = (torch.load(tmp_path / run / last / name, weights_only=True) for run in ("whole", "killed"))
        assert_same(one, two)
    one, two = (load_file(tmp_path / run / last / "adapter_model.safetensors") for run in ("whole", "killed"))
    assert_same(one, two)
    if method != "rasa":
        assert lines(tmp_path / "whole") == lines(tmp_path / "killed")


@scheduled
def test_started_again_in_one_session(method: str, tmp_path: Path) -> None:
    """An interrupted notebook cell that is run again: the optimiser still has the hooks of the first."""

    class Interrupt(TrainerCallback):
        once = True

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6 and Interrupt.once:
                Interrupt.once = False
                raise KeyboardInterrupt

    whole = llama(method)
    trainer(whole, tmp_path / "whole", AdapterCallback()).train()
    model, callback = llama(method), AdapterCallback()
    run = trainer(model, tmp_path / "run", callback, Interrupt())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.train(resume_from_checkpoint=True)
    assert callback.attached is not None
    assert callback.attached.controllers["default"].step == STEPS
    assert_same(toy.state(model), toy.state(whole))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@scheduled
def test_without_the_callback_the_first_step_says_so(method: str, optim: str, tmp_path: Path) -> None:
    run = trainer(llama(method), tmp_path, optim=optim)
    with pytest.raises(RankfoldError, match=r"without its controller.*callbacks=\[rankfold\.AdapterCallback\(\)\]"):
        run.train()
    assert run.state.global_step == 0
    assert not list(tmp_path.rglob("adapter_model.safetensors"))
    allowed = llama(method, allow_unscheduled=True)
    with pytest.warns(UserWarning, match="without its controller"):
        trainer(allowed, tmp_path, optim=optim).train()
    assert (tmp_path / f"checkpoint-{STEPS}" / "adapter_model.safetensors").exists()


@scheduled
def test_the_best_checkpoint_brings_its_schedule(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where training goes back to earlier weights, the record must not claim that their schedule had finished."""
    model = llama(method)
    best = {"metric_for_best_model": "eval_loss", "load_best_model_at_end": True, "eval_strategy": "steps"}
    run = trainer(model, tmp_path, AdapterCallback(), eval_steps=4, **best)
    monkeypatch.setattr(run, "evaluate", lambda *_, **__: {"eval_loss": float(run.state.global_step)})
    run.train()
    kept = Path(run.state.best_model_checkpoint or "")
    run.save_model(str(tmp_path / "adapter"))
    assert kept.name == "checkpoint-4"
    assert_same(toy.state(model), load_file(kept / "adapter_model.safetensors"))
    assert schedule(tmp_path / "adapter") == schedule(kept)


def test_an_unknown_length_is_known_to_trainer(tmp_path: Path) -> None:
    """Epochs become steps before training begins; a schedule too long for them is said."""
    model, callback = llama("adalora"), AdapterCallback()
    trainer(model, tmp_path, callback, max_steps=-1, num_train_epochs=2).train()
    assert callback.attached is not None
    assert callback.attached.controllers["default"].total_steps == 16
    with pytest.raises(ValueError, match="leave no step to cut ranks in a run of 3"):
        trainer(llama("adalora"), tmp_path / "short", AdapterCallback(), max_steps=3).train()


def test_half_a_line_of_ranks_is_dropped(tmp_path: Path) -> None:
    def content() -> list[int]:
        return [line["step"] for line in lines(tmp_path)]

    trainer(llama("sora"), tmp_path, AdapterCallback()).train()
    whole = content()
    with (tmp_path / "ranks.jsonl").open("a") as f:
        f.write('{"step": 4, "ranks": {"defa')
    trainer(llama("sora"), tmp_path, AdapterCallback()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert content() == whole
    trainer(llama("rasa"), tmp_path / "rasa", AdapterCallback()).train()  # nothing to record
    assert not (tmp_path / "rasa" / "ranks.jsonl").exists()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's default
@scheduled
def test_sft_trainer(method: str, tmp_path: Path) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = {f"w{i}": i for i in range(48)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w2"
    )
    plain = toy.arguments(tmp_path).to_dict()
    kept = ("max_steps", "learning_rate", "per_device_train_batch_size", "save_steps", "use_cpu", "disable_tqdm")
    args = SFTConfig(
        output_dir=str(tmp_path), report_to="none", dataloader_pin_memory=False, **{k: plain[k] for k in kept}
    )
    model, callback = llama(method), AdapterCallback()
    run = SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list([{"input_ids": row["input_ids"]} for row in toy.rows()]),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    run.train()
    assert callback.attached is not None
    assert callback.attached.controllers["default"].step == STEPS
    assert sum(alive(model)) == BUDGET.get(method, sum(alive(model)))
    assert sum(alive(model)) < 16
    assert schedule(tmp_path / f"checkpoint-{STEPS}") == {"step": STEPS, "total_steps": STEPS, "finished": True}
