"""Real processes, killed with SIGKILL while they train and while they write checkpoints; resumed, they end with the bits of
a run that was never touched."""

from __future__ import annotations

import json
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.peft_model
import pytest
import torch
import toy
from transformers import TrainerState

from rankfold import AdapterCallback
from rankfold.train.checkpoints import last_whole

pytestmark = pytest.mark.slow

STEPS, SAVE = 24, 2
KILLS = 4
PATIENCE = 180  # seconds, for the slowest of machines
#: What Trainer writes into a checkpoint, in its order.
FILES = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
)


# In the child --------------------------------------------------------------------------------------------------------


def _child(method: str, folder: str, half: str | None) -> None:
    """Trains on from the last whole checkpoint to the end; with `half`, dies with that file of its second one half written."""
    try:
        if Path(folder, "final").exists():  # killed after its last line
            return
        torch.set_num_threads(1)
        checkpoint, skipped = last_whole(Path(folder))
        with Path(folder, "starts.jsonl").open("a") as f:
            f.write(json.dumps({"from": checkpoint.name if checkpoint else None, "skipped": skipped}) + "\n")
        if half is not None:
            _die_writing(half)
        model = toy.llama(method)
        run = toy.trainer(
            model,
            Path(folder),
            AdapterCallback(),
            max_steps=STEPS,
            save_steps=SAVE,
            save_total_limit=3,
            logging_steps=3,
            max_grad_norm=0.5,
            gradient_accumulation_steps=2,
        )
        run.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        model.save_pretrained(f"{folder}/final.part")
        os.replace(f"{folder}/final.part", f"{folder}/final")
    except BaseException:
        Path(folder, "error.txt").write_text(traceback.format_exc())
        raise


def _die_writing(half: str) -> None:
    written = 0

    def dying(write: Callable[..., Any], path_of: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal written
            result, path = write(*args, **kwargs), Path(path_of(*args))
            if path.name == half and path.parent.name.startswith("checkpoint-"):
                written += 1
                if written == 2:
                    os.truncate(path, path.stat().st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    torch.save = dying(torch.save, lambda obj, f: f)
    peft.peft_model.safe_save_file = dying(peft.peft_model.safe_save_file, lambda tensors, path: path)
    TrainerState.save_to_json = dying(TrainerState.save_to_json, lambda state, path: path)
    config = peft.PeftConfig
    config.save_pretrained = dying(config.save_pretrained, lambda c, folder: Path(folder, "adapter_config.json"))


# In the parent -------------------------------------------------------------------------------------------------------


def start(method: str, folder: Path, half: str | None = None) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    child = toy.processes().Process(target=_child, args=(method, str(folder), half), daemon=True)
    child.start()
    return child


def finish(child: Any, folder: Path) -> None:
    child.join(PATIENCE)
    child.kill()
    error = folder / "error.txt"
    assert child.exitcode == 0, error.read_text() if error.exists() else "no answer"


def starts(folder: Path) -> list[dict[str, Any]]:
    file = folder / "starts.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for(child: Any, ready: Callable[[], bool]) -> None:
    """Until it is ready, dead or out of patience."""
    end = time.monotonic() + PATIENCE
    while child.is_alive() and time.monotonic() < end and not ready():
        time.sleep(0.0005)


def newest(folder: Path) -> int:
    """Step of the newest checkpoint, whole or not."""
    return max((int(p.name.partition("-")[2]) for p in folder.glob("checkpoint-*")), default=0)


def assert_untouched(killed: Path, whole: Path) -> None:
    for name in ("final/adapter_model.safetensors", "final/adapter_config.json", "ranks.jsonl"):
        if (whole / name).exists():
            assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    last = f"checkpoint-{STEPS}"
    one, two = (torch.load(run / last / "optimizer.pt", weights_only=True) for run in (whole, killed))
    toy.assert_same(one, two)


@pytest.mark.parametrize("method", ["adalora", "rac_lora"])
def test_killed_at_random(method: str, tmp_path: Path) -> None:
    """A schedule and a chain. What other methods keep is in the same files, and test_table_training.py resumes every one of them."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # pytest shows it where the test fails
    chance = random.Random(seed)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(method, whole), whole)
    for _ in range(KILLS):
        child, done = start(method, killed), newest(killed)
        if done < STEPS:
            target = chance.randrange(done + 1, min(done + STEPS // KILLS, STEPS) + 1)
            wait_for(child, lambda: newest(killed) >= target)  # noqa: B023 (called at once)
            time.sleep(chance.choice((0.0, 0.03, 0.1, 0.5)) * chance.random())  # at once: while it writes
        child.kill()
        child.join(PATIENCE)
        assert child.exitcode in (-signal.SIGKILL, 0), (killed / "error.txt").read_text()
    finish(start(method, killed), killed)
    print(starts(killed))
    assert_untouched(killed, whole)


def test_killed_with_every_file_half_written(tmp_path: Path) -> None:
    """Each half-written checkpoint is recognised, by name, and the one before it is used."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start("adalora", whole), whole)
    for half in FILES:
        child = start("adalora", killed, half)
        child.join(PATIENCE)
        assert child.exitcode == -signal.SIGKILL, (killed / "error.txt").read_text()
    finish(start("adalora", killed), killed)
    runs = starts(killed)
    assert [run["from"] for run in runs] == [None, *(f"checkpoint-{SAVE * k}" for k in range(1, len(FILES) + 1))]
    assert runs[0]["skipped"] == []
    for k, (run, half) in enumerate(zip(runs[1:], FILES, strict=True), start=1):
        (sentence,) = run["skipped"]
        assert sentence.startswith(f"checkpoint-{SAVE * (k + 1)} is incomplete: ")
        if half == "trainer_state.json":  # of the others, one that was still to come is missing
            assert half in sentence
    assert_untouched(killed, whole)


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    """Killed before the first checkpoint is whole, a run starts again, to the same bits."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start("sora", whole), whole)
    child = start("sora", killed)
    wait_for(child, lambda: newest(killed) > 0)
    child.kill()
    child.join(PATIENCE)
    finish(start("sora", killed), killed)
    assert_untouched(killed, whole)
