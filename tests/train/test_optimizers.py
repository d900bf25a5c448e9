"""`training.optimizer` of a run file: what is trained, what is said, what is refused, and that a run resumes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import write_jsonl

from rankfold.optim.registry import OPTIMIZERS
from rankfold.runfile.arguments import trainer_arguments
from rankfold.runfile.load import load, parse
from rankfold.runfile.problems import RunFileError
from rankfold.train.folder import FolderError
from rankfold.train.prepare import make_plan, prepare
from rankfold.train.run import train

Values = dict[str, Any]
DOCS = Path(__file__).parents[2] / "docs"


def silent(sentence: str) -> None:
    pass


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def run_of(values: Values, optimizer: str, *overrides: str, **training: Any) -> Any:
    return parse(values | {"training": values["training"] | {"optimizer": optimizer, **training}}, overrides)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run(language_model: Values, name: str):
    said: list[str] = []
    run = run_of(language_model, name)
    plan = make_plan(prepare(run))
    result = train(run, say=said.append)
    assert plan.budget.adapter == result.adapter == result.trainable
    full = 2 * 2 * (16 + 16 + 16 + 8)  # two layers of q (16 to 16) and v (16 to 8), rank 2
    assert result.adapter == (2 * 2 * (16 + 8) if name == "lora_fa" else full)
    assert result.stored == full  # what is frozen is part of the adapter
    words = dict(plan.lines())["optimiser"]
    assert f"optimiser: {words}" in said
    assert words.startswith(f"{name} at 0.01, ")
    assert ("no clipping" in words) == (name in ("lora_rite", "lora_pro"))
    assert f"4 pairs ({result.adapter:,} parameters)" in words
    assert plan.optimizer is not None
    shapes = [(16, 16, 2), (8, 16, 2)] * 2
    assert plan.optimizer.state_bytes == OPTIMIZERS[name].state_bytes(shapes)
    card = (result.adapter_path / "README.md").read_text(encoding="utf-8")
    row = OPTIMIZERS[name]
    assert f"| optimiser | {row.title} (`{name}`), learning rate 0.01" in card
    assert f"Optimiser: {row.title}, [arXiv {row.paper}]" in card
    assert any(t.any() for key, t in weights(result.adapter_path).items() if "up" in key)


def test_a_trainer_without_the_argument(language_model: Values, tmp_path: Path):
    """TRL's DPOTrainer does not hand optimizer_cls_and_kwargs on."""
    rows = [{"prompt": f"{i} plus 1 is", "chosen": f" {i + 1}", "rejected": f" {i}"} for i in range(8)]
    values = language_model | {
        "task": "preference",
        "data": {"train": str(write_jsonl(tmp_path / "pairs.jsonl", rows))},
    }
    run = run_of(values, "lora_rite", max_steps=2)
    result = train(run, say=silent)
    kept = torch.load(Path(run.output, "checkpoints", "checkpoint-2", "optimizer.pt"), weights_only=True)
    assert kept["param_groups"][0]["kind"] == "pairs"
    assert any(t.any() for key, t in weights(result.adapter_path).items() if "up" in key)


def test_what_is_not_a_pair_is_named(classification: Values):
    """RaSA's pool and gates, and the classifier's new head."""
    plan = make_plan(prepare(run_of(classification, "lora_rite", optimizer_options={"plain_lr": 1e-3})))
    words = dict(plan.lines())["optimiser"]
    assert words.startswith("lora_rite (plain_lr 0.001) at 0.01, no clipping of gradients; 13 pairs (")
    for part in ("13 × gate of a pair", "× shared by several layers", "classifier.modules_to_save.default.weight and 1 more"):  # fmt: skip
        assert part in words


def test_clipping_is_as_asked(language_model: Values):
    def norm(*given: Any, **training: Any) -> float:
        return trainer_arguments(run_of(language_model, *given, **training), validated=False)["max_grad_norm"]

    assert norm("lora_rite") == 0
    assert norm("lora_rite", max_grad_norm=2.0) == 2
    assert norm("lora_pro", optimizer_options={"mode": "sgd"}) == 1
    assert norm("riemannian") == norm("adamw_torch") == 1


@pytest.mark.parametrize(
    ("training", "says"),
    [
        ({"optimizer": "lora_rit"}, "training.optimizer: unknown optimizer 'lora_rit'; did you mean 'lora_rite'?"),
        ({"optimizer": "zzz"}, r"known: .*adamw_torch.*lora_pro.*riemannian"),
        (
            {"optimizer": "lora_rite", "optimizer_options": {"clp": 1}},
            "training.optimizer_options.clp: LoraRite: option clp=1 is not known; did you mean 'clip'?",
        ),
        (
            {"optimizer": "lora_pro", "optimizer_options": {"mode": "sgd"}, "weight_decay": 0.1},
            'training.weight_decay: LoraPro: weight_decay=0.1 must be 0 in mode="sgd"',
        ),
        (
            {"optimizer": "lora_fa", "optimizer_options": {"lr": 0.1}},
            "training.optimizer_options.lr: is training.learning_rate; set it there",
        ),
        (
            {"optimizer": "lora_fa", "optimizer_options": {"weight_decay": 0.1}},
            "training.optimizer_options.weight_decay: is training.weight_decay; set it there",
        ),
        ({"optimizer_options": {"clip": 1}}, "training.optimizer_options: are for lora_fa, lora_plus.*'adamw_torch' takes"),
        (
            {"optimizer": "riemannian", "extra": {"adam_beta1": 0.8}},
            r"training.extra.adam_beta1: 0.8 is not read by 'riemannian'; use optimizer_options: \{betas",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_settings(language_model: Values, training: Values, says: str):
    with pytest.raises(RunFileError, match=says) as error:
        parse(language_model | {"training": language_model["training"] | training})
    assert len(error.value.problems) == 1


@pytest.mark.parametrize("method", ["adalora", "dynamic_dora"])
def test_methods_with_a_penalty_are_refused_by_name(language_model: Values, method: str):
    given: Values = {**language_model, "method": {"name": method, "r": 4, "target_r": 2, "target_modules": ["q_proj"]}}
    for name in OPTIMIZERS:
        if name == "lora_plus":
            run_of(given, name)
        else:
            with pytest.raises(RunFileError, match=f"training.optimizer: '{name}' cannot train (AdaLoRA|Dynamic DoRA)"):
                run_of(given, name)


def test_a_method_without_pairs(language_model: Values):
    given: Values = {**language_model, "method": {"name": "peft:vera", "r": 4, "target_modules": ["q_proj"]}}
    for attempt in (lambda run: make_plan(prepare(run)), lambda run: train(run, say=silent)):
        with pytest.raises(ValueError, match="has no trainable pair of LoRA factors"):
            attempt(run_of(given, "lora_rite"))
    assert not Path(given["output"]).exists()


@pytest.mark.parametrize("name", ["lora_rite", "lora_pro"])
def test_resume_refuses_another_optimizer(language_model: Values, name: str):
    train(run_of(language_model, name), say=silent)
    with pytest.raises(FolderError, match=rf"training\.optimizer was '{name}', is 'adamw_torch'"):
        train(parse(language_model), resume=True, say=silent)
    with pytest.raises(FolderError, match=r"training\.optimizer_options\.eps was None, is 0\.1"):
        train(run_of(language_model, name, optimizer_options={"eps": 0.1}), resume=True, say=silent)
    assert train(run_of(language_model, name, max_grad_norm=0), resume=True, say=silent).steps == 4


def test_third_parties(language_model: Values, tmp_path: Path):
    """The example of docs/optimisers.md, in a file that `imports` names."""
    code = re.findall(r"```python\n(.*?)```", (DOCS / "optimisers.md").read_text(encoding="utf-8"), re.S)[-1]
    (tmp_path / "sign_step_of_theirs.py").write_text(code, encoding="utf-8")
    given = language_model | {"imports": [str(tmp_path / "sign_step_of_theirs.py")]}
    try:
        result = train(run_of(given, "sign_step"), say=silent)
    finally:
        OPTIMIZERS.pop("sign_step", None)
        sys.modules.pop("sign_step_of_theirs", None)
    card = (result.adapter_path / "README.md").read_text(encoding="utf-8")
    assert "Sign (`sign_step`)" in card
    assert "Optimiser:" not in card  # it has no paper


def test_the_example_is_valid():
    run = load(DOCS.parent / "examples" / "optimiser.yaml")
    assert run.training.optimizer in OPTIMIZERS


@pytest.mark.slow
def test_killed_and_resumed_to_the_bit(language_model: Values, tmp_path: Path):
    """`rankfold train` in a process of its own, killed after a checkpoint, and `--resume`; beside a run that nobody touched. The
    chain's knots lie after steps 3, 6 and 9, and there are checkpoints after every second step. tests/optim resumes every optimiser."""
    method = {"name": "cola", "links": 4, "r": 4, "target_modules": "all-linear", "lora_dropout": 0.1}
    values: Values = {**language_model, "method": method}
    values["training"] = values["training"] | {
        "optimizer": "lora_pro", "max_steps": 12, "gradient_accumulation": 2, "gradient_checkpointing": True, "warmup": 2, "keep_best": False,
    }  # fmt: skip
    straight = train(parse(values | {"output": str(tmp_path / "straight")}), say=silent)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "rankfold", "train", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with open(tmp_path / "log", "w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            until = time.monotonic() + 300
            while not list(Path(values["output"]).glob("checkpoints/checkpoint-*/trainer_state.json")):
                assert child.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < until
                time.sleep(0.01)
        finally:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    assert not Path(values["output"], "result.json").exists()
    resumed = train(parse(values), resume=True, say=silent)
    assert resumed.resumed_at in (2, 4, 6, 8, 10)
    assert resumed.steps == straight.steps == 12
    before, after = weights(straight.adapter_path), weights(resumed.adapter_path)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value), key
